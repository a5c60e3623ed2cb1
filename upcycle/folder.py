"""Write a checkpoint folder from tensors that are produced one at a time; whole or absent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import new_folder, write_json
from moexpand.upcycle.checkpoint import CONFIG, side_files_of
from moexpand.upcycle.config_json import Config
from moexpand.upcycle.layout import check_space, copy_side_files, create_shards, open_at, plan_layout
from moexpand.upcycle.model_code import every_code_file, write_model_code
from moexpand.upcycle.safetensors_file import Shape, TensorInfo, dtype_code


def write_checkpoint(
    target: Path,
    config: Config,
    tensors: Mapping[str, tuple[str, Shape]],
    produce: Callable[[str], Any],
    side_files: Path | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a Hugging Face folder: config.json, model code of grouped models, shards, index and side files.

    Args:
        target: folder to write; it must not exist, or be empty.
        config: config.json.
        tensors: dtype (`bfloat16`, `torch.bfloat16` or `BF16`) and shape by name.
        produce: called once a tensor, in the order of `tensors`; returns a torch tensor of the dtype told, or its bytes as a
            numpy array or anything with the buffer protocol. Only one tensor is held at a time.
        side_files: folder whose files besides weights, index and configs are copied (tokenizer, chat template, ...).
        max_shard_size: such as `5GB`.

    Raises:
        InputError: `target` exists, or a produced tensor has another size than told.
        EnvironmentFailure: the disk is full or failed.
    """
    layout = plan_layout({name: (dtype_code(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}, max_shard_size)
    check_space(target, layout.nbytes)
    with new_folder(target) as folder:
        create_shards(folder, layout)
        write_json(folder / CONFIG, config)
        if side_files is not None:
            copy_side_files(Path(side_files), side_files_of(Path(side_files)), folder, keep=every_code_file())
        write_model_code(folder, config["model_type"])
        for name, place in layout.tensors.items():
            data = _bytes(produce(name), place)
            with open_at(folder, place) as write:
                write(data, 0)


def _bytes(value: Any, place: TensorInfo) -> memoryview:
    if hasattr(value, "untyped_storage"):  # a torch tensor; numpy has no bf16, so its bytes are taken
        import torch

        value = value.detach().cpu().contiguous()
        if dtype_code(value.dtype) != place.dtype or tuple(value.shape) != place.shape:
            raise InputError(
                f"{place.name} was announced as {place.dtype} {place.shape}, not {value.dtype} {tuple(value.shape)}."
            )
        value = value.reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value)
    data = memoryview(value).cast("B")
    if data.nbytes != place.nbytes:
        raise InputError(f"{place.name} was announced with {place.nbytes:,} bytes, but {data.nbytes:,} were given.")
    return data
