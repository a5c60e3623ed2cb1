"""The safetensors format, read strictly and written from shapes alone; no torch.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes, one
after the other without holes (https://github.com/huggingface/safetensors, "Format"). Since the header follows from names,
dtypes and shapes, a file can be laid out before any of its bytes exist.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from moexpand.base.errors import InputError

MAX_HEADER = 100_000_000
ALIGNMENT = 4096
"""Tensor data starts at a multiple of this, so that block-sized expert matrices stay block-aligned on disk."""

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by the dtype's name in a header."""

CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32",
    "int64": "I64", "uint64": "U64", "float64": "F64",
}  # fmt: skip
"""Header names of dtypes, by torch's names."""

METADATA = {"format": "pt"}
"""What a header says of the whole file: its tensors are stored as torch means them."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: Shape
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def nbytes(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor of a header dtype."""
    return ITEM_SIZES[dtype] * math.prod(shape)


def dtype_code(dtype: object) -> str:
    """Header name of a dtype given as `BF16`, `bfloat16` or `torch.bfloat16`."""
    name = str(dtype).removeprefix("torch.")
    code = CODES.get(name, name)
    if code not in ITEM_SIZES:
        raise InputError(f"safetensors files have no dtype {dtype}; known are {', '.join(CODES)}.")
    return code


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of a file, in the order of their bytes; reads the header only.

    Raises:
        InputError: the file is missing, truncated, not safetensors, or its offsets overlap, leave holes or contradict the
            shapes; the message names the file and the tensor.
    """
    file = Path(file)
    entries, data, size = _read_entries(file)
    entries.pop("__metadata__", None)
    infos = [_info(file, name, entry, data) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_ranges(file, infos, data, size)
    return {info.name: info for info in infos}


def read_metadata(file: Path) -> Any:
    """What a file's header says besides its tensors; None when that is nothing."""
    return _read_entries(Path(file))[0].get("__metadata__")


def _read_entries(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, where the data begins, and the size of the file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise InputError(f"{file} is not a whole safetensors file: {size:,} bytes cannot hold its header of {length:,}.")
            raw = handle.read(length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from None
    return _parse(file, raw), 8 + length, size


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise InputError(f"{file} holds {name!r} twice in its header.")
            found[name] = value
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not a safetensors file: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise InputError(f"{file} is not a safetensors file: its header is not a JSON object.")
    return header


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _info(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in ITEM_SIZES or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise InputError(f"{file}: the header entry of {name} is not a known dtype, a shape and two offsets.")
    start, stop = offsets
    if stop - start != nbytes(dtype, tuple(shape)):
        raise InputError(f"{file}: {name} has {stop - start:,} bytes, but {dtype} {shape} takes {nbytes(dtype, tuple(shape)):,}.")
    return TensorInfo(name, dtype, tuple(shape), file, data + start, data + stop)


def _check_ranges(file: Path, infos: Iterable[TensorInfo], data: int, size: int) -> None:
    end = data
    for info in infos:
        if info.stop > size:
            raise InputError(f"{file} is truncated: it ends at byte {size:,}, but {info.name} ends at {info.stop:,}.")
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise InputError(f"{file}: {info.name} {fault} (it starts at byte {info.start:,}, not {end:,}).")
        end = info.stop
    if end != size:
        raise InputError(f"{file} has {size - end:,} bytes after its last tensor; it is damaged or not a safetensors file.")


def build_header(tensors: Mapping[str, tuple[str, Shape]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file that holds `tensors` in this order, and the absolute byte range of each.

    Args:
        tensors: (header dtype, shape) by name.

    Returns:
        Length field and header, padded with spaces to a multiple of `ALIGNMENT`, and {name: (start, stop)}.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % ALIGNMENT)
    data = 8 + len(raw)
    ranges = {name: (data + header[name]["data_offsets"][0], data + header[name]["data_offsets"][1]) for name in tensors}
    return len(raw).to_bytes(8, "little") + raw, ranges
