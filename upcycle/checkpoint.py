"""A Hugging Face checkpoint folder, opened by its headers alone: config, tensors by name, side files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, read_json
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.config_json import Config, read_architecture
from moexpand.upcycle.families import expected_tensors
from moexpand.upcycle.safetensors_file import CODES, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPANSION = "expansion.json"
OWN_FILES = (CONFIG, INDEX, EXPANSION)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")

NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "F32": "float32", "F64": "float64",
    "BF16": "uint16", "F8_E4M3": "uint8", "F8_E5M2": "uint8", "F8_E8M0": "uint8",
}  # fmt: skip
"""numpy dtypes of header dtypes; formats that numpy lacks come as their bit patterns."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder; nothing but headers and JSON has been read.

    Tensors lie in order of shard and offset in `tensors`; every one that the config calls for is there, with its shape.
    """

    folder: Path
    config: Config
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    """Files besides weights, index, config.json and expansion.json, relative to the folder."""

    @cached_property
    def architecture(self) -> Architecture:
        """Shape of the model, from config.json."""
        return read_architecture(self.config, str(self.folder / CONFIG))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; an unknown name is an `InputError`."""
        if name not in self.tensors:
            raise InputError(f"{self.folder} has no tensor {name}.")
        return self.tensors[name]

    def read_bytes(self, name: str, rows: slice | None = None) -> bytearray:
        """Bytes of a tensor, or of a contiguous range of its first axis; only these bytes are read."""
        info = self.info(name)
        start, stop, _ = _byte_range(info, rows)
        return read_range(info.file, start, stop)

    def read_numpy(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or rows of it, as numpy; bf16 and fp8 come as uint16 and uint8 bit patterns."""
        info = self.info(name)
        _, _, shape = _byte_range(info, rows)
        return np.frombuffer(self.read_bytes(name, rows), dtype=NUMPY[info.dtype]).reshape(shape)

    def read_torch(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """A tensor, or rows of it, as a CPU tensor of its own dtype that owns its memory."""
        import torch

        info = self.info(name)
        _, _, shape = _byte_range(info, rows)
        dtype = getattr(torch, {code: torch_name for torch_name, code in CODES.items()}[info.dtype])
        return (
            torch.frombuffer(self.read_bytes(name, rows), dtype=dtype).reshape(shape)
            if 0 not in shape
            else torch.empty(shape, dtype=dtype)
        )


def read_range(file: Path, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file; a file that ends early or cannot be read is an `EnvironmentFailure`."""
    buffer = bytearray(stop - start)
    with disk_errors(f"reading {file}"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            read_into(descriptor, memoryview(buffer), start, file)
        finally:
            os.close(descriptor)
    return buffer


def read_into(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    """Fill `view` with the bytes of an open file from `offset` on."""
    with disk_errors(f"reading {file}"):
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise EnvironmentFailure(f"{file} holds nothing at byte {offset:,} any more; it was cut since it was opened.")
            view, offset = view[count:], offset + count


def _byte_range(info: TensorInfo, rows: slice | None) -> tuple[int, int, tuple[int, ...]]:
    if rows is None:
        return info.start, info.stop, info.shape
    first, last, step = rows.indices(info.shape[0])
    if step != 1:
        raise InputError(f"Rows of {info.name} can only be read as one contiguous range, not with step {step}.")
    last = max(first, last)
    row = info.nbytes // info.shape[0] if info.shape[0] else 0
    return info.start + first * row, info.start + last * row, (last - first, *info.shape[1:])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, single-file or sharded, and check that it is whole.

    Raises:
        InputError: a file is missing or damaged, index and shards disagree, or the tensors are not those that config.json
            calls for; the message names the file or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a Hugging Face checkpoint folder is needed.")
    config = read_json(folder / CONFIG)
    read_architecture(config, str(folder / CONFIG))  # a model of another kind is reported as such, not by its tensors
    tensors = _indexed(folder) if (folder / INDEX).is_file() else _single(folder)
    checkpoint = Checkpoint(folder, config, tensors, tuple(side_files_of(folder)))
    _check_tensors(checkpoint)
    return checkpoint


def _single(folder: Path) -> dict[str, TensorInfo]:
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; a checkpoint in safetensors format is needed.")
    _refuse_strays(folder, {SINGLE})
    return read_header(folder / SINGLE)


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    index = read_json(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from tensor names to files.")
    files = sorted(set(named.values()))
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX} names the file {file!r}, which is not a plain file name.")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing; {INDEX} names it.")
    _refuse_strays(folder, set(files))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if named.get(name) != file:
                place = f"puts it in {named[name]}" if name in named else "does not name it"
                raise InputError(f"{folder / file} holds {name}, but {INDEX} {place}.")
            tensors[name] = info
    for name, file in named.items():
        if name not in tensors:
            raise InputError(f"{folder / INDEX} puts {name} in {file}, which does not hold it.")
    return tensors


def _refuse_strays(folder: Path, used: set[str]) -> None:
    strays = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    if strays:
        raise InputError(f"{folder / strays[0]} belongs to no index; move it away or name its tensors in {INDEX}.")


def _check_tensors(checkpoint: Checkpoint) -> None:
    expected = expected_tensors(checkpoint.architecture)
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise InputError(f"{checkpoint.folder} has no tensor {name}, which its config.json calls for.")
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise InputError(f"{info.file}: {name} has the shape {list(info.shape)}, but config.json calls for {list(shape)}.")
        if info.dtype not in ("F64", "F32", "BF16", "F16"):
            raise InputError(f"{info.file}: {name} is stored as {info.dtype}; only F32, BF16, F16 and F64 weights are supported.")
    for name, info in checkpoint.tensors.items():
        if name not in expected:
            raise InputError(f"{info.file} holds {name}, which is no tensor of a {checkpoint.architecture.model_type} model.")


def side_files_of(folder: Path) -> list[Path]:
    """Files of a folder besides weights, index and configs, relative to it; hidden ones are left out."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in relative
        if not any(part.startswith(".") for part in path.parts)
        and path.suffix not in WEIGHT_SUFFIXES
        and str(path) not in OWN_FILES
    )


def side_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all side files."""
    return sum((checkpoint.folder / path).stat().st_size for path in checkpoint.side_files)
