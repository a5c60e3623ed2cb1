"""Folders written one tensor at a time are ordinary checkpoints, whole or absent."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.folder import write_checkpoint


def _tensors(checkpoint: Checkpoint, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, info.shape) for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_torch_tensors_come_back_as_they_were(parent: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = open_checkpoint(parent)
    produced = []

    def produce(name: str) -> torch.Tensor:
        produced.append(name)
        return source.read_torch(name).to(dtype)

    write_checkpoint(tmp_path / "out", source.config, _tensors(source, str(dtype)), produce, parent, "1MB")
    assert produced == list(source.tensors)  # in the order told, whatever the layout on disk
    written = open_checkpoint(tmp_path / "out")
    assert len({info.file for info in written.tensors.values()}) > 1
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, source.read_torch(name).to(dtype))
    assert written.side_files == source.side_files


def test_numpy_and_bytes_are_taken_too_and_code_travels(children: dict[str, Path], tmp_path: Path) -> None:
    source = open_checkpoint(children["halves_bits"])

    def produce(name: str) -> np.ndarray | bytearray:
        return source.read_numpy(name) if "experts.1" in name else source.read_bytes(name)

    write_checkpoint(tmp_path / "out", source.config, _tensors(source, "float32"), produce)
    written = open_checkpoint(tmp_path / "out")
    assert all(written.read_bytes(name) == source.read_bytes(name) for name in source.tensors)
    assert {str(file) for file in written.side_files} == {"configuration_qwen3_moe_grouped.py", "modeling_qwen3_moe_grouped.py"}


@pytest.mark.parametrize(("value", "says"), [(torch.zeros(3), "announced as BF16"), (b"123", "but 3 were given")])
def test_a_tensor_of_another_size_or_dtype_leaves_nothing(parent: Path, tmp_path: Path, value: object, says: str) -> None:
    source = open_checkpoint(parent)
    with pytest.raises(InputError, match=says):
        write_checkpoint(tmp_path / "out", source.config, _tensors(source, "bfloat16"), lambda name: value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_dtype_is_refused(parent: Path, tmp_path: Path) -> None:
    source = open_checkpoint(parent)
    with pytest.raises(InputError, match="no dtype complex64"):
        write_checkpoint(tmp_path / "out", source.config, {"a": ("complex64", (1,))}, source.read_bytes)
