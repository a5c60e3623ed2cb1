"""Opening a folder checks it whole, and reading takes the bytes asked for and no others."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.config_json import lmdeploy_config, read_architecture
from moexpand.upcycle.fresh_config import architecture_config
from tests.parents import TINY, make_parent

Damaged = Callable[[Path], Path]
ROUTER = "model.layers.1.mlp.gate.weight"


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _reference(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("which", ["parent", "small_parent"])
def test_tensors_are_those_that_the_safetensors_library_reads(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    checkpoint, reference = open_checkpoint(folder), _reference(folder)
    assert set(checkpoint.tensors) == set(reference)
    for name, tensor in reference.items():
        read = checkpoint.read_torch(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        bits = checkpoint.read_numpy(name).view(np.uint8)
        assert np.array_equal(bits, tensor.contiguous().view(torch.uint8).numpy().reshape(bits.shape))
        assert checkpoint.read_numpy(name).dtype.name == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("rows", [slice(3, 10), slice(0, 0), slice(120, None), slice(None)])
def test_rows_are_read_without_the_others(parent: Path, monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    checkpoint, reference = open_checkpoint(parent), _reference(parent)[ROUTER]
    count, real = [0], os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        count[0] += (done := real(descriptor, buffers, offset))
        return done

    monkeypatch.setattr(os, "preadv", counted)
    assert torch.equal(checkpoint.read_torch(ROUTER, rows), reference[rows])
    assert count[0] == reference[rows].nbytes


def test_a_single_file_opens_without_an_index(parent: Path, tmp_path: Path) -> None:
    save_file(_reference(parent), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((parent / "config.json").read_bytes())
    assert set(open_checkpoint(tmp_path).tensors) == set(open_checkpoint(parent).tensors)


def test_both_forms_of_a_config_describe_the_same_shape(tmp_path: Path) -> None:
    forms = [make_parent(tmp_path / str(form), hub_form=form, **TINY) for form in (True, False)]
    hub, local = (open_checkpoint(folder) for folder in forms)
    assert "num_experts" in hub.config
    assert "num_local_experts" in local.config
    assert hub.architecture == local.architecture
    assert hub.architecture.rope_theta == 1e6
    assert read_architecture(architecture_config(hub.architecture)) == hub.architecture


def test_a_grouped_config_is_read_back_in_both_of_its_types(parent: Path, children: dict[str, Path]) -> None:
    child = open_checkpoint(children["halves_bits"])
    assert (child.architecture.num_experts, child.architecture.router_n_groups) == (512, 8)
    assert read_architecture(architecture_config(child.architecture)) == child.architecture
    lmdeploy = lmdeploy_config(child.config)
    assert read_architecture(lmdeploy) == replace(child.architecture, model_type="qwen3_moe")
    assert lmdeploy == open_checkpoint(parent).config | {"num_experts": 512, "router_n_groups": 8}


def test_the_config_that_we_write_is_the_model_that_transformers_builds(parent: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = open_checkpoint(parent).architecture
    config = architecture_config(arch)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        tensor.numel() for tensor in _reference(parent).values()
    )
    assert model.config.rope_parameters["rope_theta"] == arch.rope_theta


def test_a_missing_shard_is_named(parent: Path, damaged: Damaged) -> None:
    folder = damaged(parent)
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00006\.safetensors is missing"):
        open_checkpoint(folder)


def test_a_truncated_shard_is_named(parent: Path, damaged: Damaged) -> None:
    file = damaged(parent) / "model-00003-of-00006.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(InputError, match=r"model-00003-of-00006\.safetensors is truncated.* but model\."):
        open_checkpoint(file.parent)


def test_an_index_naming_an_absent_tensor_is_refused(parent: Path, damaged: Damaged) -> None:
    folder = damaged(parent)
    _edit(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.layers.7.x": "model-00001-of-00006.safetensors"}),
    )
    with pytest.raises(InputError, match=r"puts model\.layers\.7\.x in model-00001"):
        open_checkpoint(folder)


def test_a_tensor_that_the_index_leaves_out_is_refused(parent: Path, damaged: Damaged) -> None:
    folder = damaged(parent)
    _edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(ROUTER))
    with pytest.raises(InputError, match=f"holds {ROUTER}, but .* does not name it"):
        open_checkpoint(folder)


def test_an_index_cannot_point_outside_its_folder(parent: Path, damaged: Damaged) -> None:
    folder = damaged(parent)
    _edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({ROUTER: "../x.safetensors"}))
    with pytest.raises(InputError, match="not a plain file name"):
        open_checkpoint(folder)


def test_a_stray_shard_is_named(parent: Path, damaged: Damaged) -> None:
    folder = damaged(parent)
    save_file({"x": torch.zeros(1)}, folder / "adapter.safetensors")
    with pytest.raises(InputError, match=r"adapter\.safetensors belongs to no index"):
        open_checkpoint(folder)


def _single(parent: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = _reference(parent)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((parent / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(ROUTER), f"has no tensor {ROUTER}"),
        (lambda tensors: tensors.update({ROUTER: torch.zeros(64, 64)}), rf"{ROUTER} has the shape \[64, 64\].*\[128, 64\]"),
        (
            lambda tensors: tensors.update({"model.vision.weight": torch.zeros(2)}),
            r"holds model\.vision\.weight, which is no tensor",
        ),
        (lambda tensors: tensors.update({ROUTER: torch.zeros(128, 64, dtype=torch.int8)}), f"{ROUTER} is stored as I8"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(parent: Path, tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_checkpoint(_single(parent, tmp_path / "single", change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen3"}, "'qwen3', not a known Mixture-of-Experts"),
        ({"num_experts": None}, "num_experts=None"),
        ({"num_local_experts": 64}, "num_experts=128 and num_local_experts=64"),
        ({"router_n_groups": 3}, "router_n_groups=3"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"mlp_only_layers": [-1]}, r"mlp_only_layers=\[-1\]"),
        ({"mlp_only_layers": [0]}, r"no tensor model\.layers\.0\.mlp\.gate_proj\.weight"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_configs_that_cannot_be_used_are_refused_by_key(
    parent: Path, damaged: Damaged, change: dict[str, Any], says: str
) -> None:
    folder = damaged(parent)
    _edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(InputError, match=says) as error:
        open_checkpoint(folder)
    assert "config.json" in str(error.value)


def test_a_file_in_place_of_a_folder_is_refused(parent: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        open_checkpoint(parent / "config.json")


def test_bytes_are_read_without_importing_torch(parent: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moexpand.upcycle.checkpoint import open_checkpoint\n"
        f"c = open_checkpoint(Path({str(parent)!r})); c.read_numpy({ROUTER!r})\n"
        "import moexpand.upcycle.verify, moexpand.upcycle.count, moexpand.upcycle.folder\n"
        "assert not {'torch', 'transformers', 'safetensors', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
