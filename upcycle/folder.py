"""Write a checkpoint folder from tensors that are produced one at a time; whole or absent."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, new_folder, write_json
from moexpand.upcycle.checkpoint import CONFIG, INDEX, side_files_of
from moexpand.upcycle.config_json import Config
from moexpand.upcycle.direct import OutputFile, aligned_buffer, write_all
from moexpand.upcycle.jobs import Bundle
from moexpand.upcycle.layout import Layout, check_space, copy_side_files, plan_layout
from moexpand.upcycle.model_code import every_code_file, write_model_code
from moexpand.upcycle.safetensors_file import Shape, TensorInfo, dtype_code

PIECE = 8 << 20


def write_checkpoint(
    target: Path,
    config: Config,
    tensors: Mapping[str, tuple[str, Shape]],
    produce: Callable[[str], Any],
    side_files: Path | None = None,
    max_shard_size: str | int = "5GB",
    leave_out: Iterable[str] = (),
) -> None:
    """Write a Hugging Face folder: config.json, model code of grouped models, shards, index and side files.

    Args:
        target: folder to write; it must not exist, or be empty.
        config: config.json.
        tensors: dtype (`bfloat16`, `torch.bfloat16` or `BF16`) and shape by name.
        produce: called once a tensor, in the order of `tensors`; returns a torch tensor of the dtype told, or its bytes as a
            numpy array or anything with the buffer protocol, or an iterator of its parts. Only one of these is held at a time.
        side_files: folder whose files besides weights, index and configs are copied (tokenizer, chat template, ...).
        max_shard_size: such as `5GB`.
        leave_out: side files that are not copied.

    Raises:
        InputError: `target` exists, or a produced tensor has another size than told.
        EnvironmentFailure: the disk is full or failed.
    """
    stored = {name: (dtype_code(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}
    layout = plan_layout(stored, [Bundle((name,), ()) for name in stored], max_shard_size)
    check_space(target, layout.nbytes)
    with new_folder(target) as folder:
        write_json(folder / INDEX, layout.index())
        write_json(folder / CONFIG, config)
        if side_files is not None:
            copy_side_files(Path(side_files), side_files_of(Path(side_files)), folder, keep={*every_code_file(), *leave_out})
        write_model_code(folder, config)
        buffer = aligned_buffer(PIECE)
        for file, places in groupby(layout.tensors.values(), key=lambda place: str(place.file)):
            with closing(_create(folder, layout, file)) as output:
                for place in places:
                    _write(output, produce(place.name), place, buffer)


def _create(folder: Path, layout: Layout, file: str) -> OutputFile:
    """A shard with its header and its full size reserved."""
    with disk_errors(f"writing {file} of {folder}"):
        output = OutputFile(folder / file, layout.sizes[file])
        write_all(output.ordinary, layout.header(file), 0)
    return output


def _write(output: OutputFile, value: Any, place: TensorInfo, buffer: memoryview) -> None:
    """Write a tensor, whole or in parts, by way of `buffer`, which begins at a page."""
    done = 0
    for data in map(_bytes, value) if isinstance(value, Iterator) else [_whole(value, place)]:
        if done + len(data) <= place.nbytes:
            with disk_errors(f"writing {place.name} to {output.path}"):
                for begin in range(0, len(data), PIECE):
                    piece = buffer[: min(PIECE, len(data) - begin)]
                    piece[:] = data[begin : begin + PIECE]
                    output.write(piece, place.start + done + begin)
        done += len(data)
    if done != place.nbytes:
        raise InputError(f"{place.name} was announced with {place.nbytes:,} bytes, but {done:,} were given.")


def _whole(value: Any, place: TensorInfo) -> memoryview:
    """The bytes of a tensor that is given as one."""
    if hasattr(value, "untyped_storage"):  # a torch tensor; numpy has no bf16, so its bytes are taken
        import torch

        value = value.detach().cpu().contiguous()
        if dtype_code(value.dtype) != place.dtype or tuple(value.shape) != place.shape:
            raise InputError(
                f"{place.name} was announced as {place.dtype} {place.shape}, not {value.dtype} {tuple(value.shape)}."
            )
        value = value.reshape(-1).view(torch.uint8).numpy()
    return _bytes(value)


def _bytes(value: Any) -> memoryview:
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).reshape(-1).view(np.uint8)  # bf16 and fp8 are no formats of a buffer
    return memoryview(value).cast("B")
