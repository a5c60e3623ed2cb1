"""Where every byte of a checkpoint folder goes, decided from names, dtypes and shapes before any of them exists."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, write_json
from moexpand.upcycle.checkpoint import INDEX
from moexpand.upcycle.safetensors_file import ALIGNMENT, ITEM_SIZES, Shape, TensorInfo, build_header, nbytes

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Layout:
    """The shard table of a folder: headers by file name, file sizes in bytes, and the place of every tensor.

    `tensors` keeps the order in which they were given; their `file` is relative to the folder.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(self.sizes.values())


def parse_size(size: str | int) -> int:
    """Bytes of `5GB` (decimal units) or `5GiB` (binary units), or of a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", str(size).strip(), re.IGNORECASE)
    unit = (match[2] or "").upper().removesuffix("B") if match else ""
    count = int(float(match[1]) * UNITS[f"{unit}B" if unit else ""]) if match else 0
    if count < 1:
        raise InputError(f"{size!r} is not a size; write for instance 5GB or 512MiB.")
    return count


def plan_layout(tensors: Mapping[str, tuple[str, Shape]], max_shard_size: str | int = "5GB") -> Layout:
    """Distribute tensors over shards in the order given; a tensor larger than a shard gets one of its own.

    Args:
        tensors: (header dtype, shape) by name.
        max_shard_size: largest number of tensor bytes of a file, see `parse_size`.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = [[]]
    room = limit
    for name, (dtype, shape) in tensors.items():
        size = nbytes(dtype, shape)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    headers, sizes, places = {}, {}, {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names.sort(key=lambda name: _alignment_rank(*tensors[name]))
        headers[file], ranges = build_header({name: tensors[name] for name in names})
        sizes[file] = max((stop for _, stop in ranges.values()), default=len(headers[file]))
        for name, (start, stop) in ranges.items():
            places[name] = TensorInfo(name, *tensors[name], Path(file), start, stop)
    return Layout(headers, sizes, {name: places[name] for name in tensors})


def _alignment_rank(dtype: str, shape: Shape) -> tuple[bool, int]:
    """Whole blocks first, then wide elements first, so that every tensor is aligned to its element and most to blocks."""
    return nbytes(dtype, shape) % ALIGNMENT != 0, -ITEM_SIZES[dtype]


def check_space(target: Path, size: int) -> None:
    """Refuse to start when the file system of `target` has less than `size` bytes free."""
    folder = Path(target).absolute()
    while not folder.exists():
        folder = folder.parent
    with disk_errors(f"looking at {folder}"):
        free = shutil.disk_usage(folder).free
    if free < size:
        raise EnvironmentFailure(f"{target} needs {size:,} bytes, but only {free:,} are free on the disk of {folder}.")


def create_shards(folder: Path, layout: Layout) -> None:
    """Create every shard with its header and its full size reserved, and the index."""
    for file, header in layout.headers.items():
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _reserve(descriptor, layout.sizes[file])
            write_all(descriptor, header, 0)
        finally:
            os.close(descriptor)
    total = sum(info.nbytes for info in layout.tensors.values())
    weight_map = {name: str(info.file) for name, info in sorted(layout.tensors.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


@contextmanager
def open_at(folder: Path, place: TensorInfo) -> Iterator[Callable[[bytes | memoryview, int], None]]:
    """A function that writes bytes at an offset inside one tensor of a shard that `create_shards` has made."""
    with disk_errors(f"writing {place.name} to {place.file} of {folder}"):
        descriptor = os.open(folder / place.file, os.O_WRONLY)
        try:
            yield lambda data, offset: write_all(descriptor, data, place.start + offset)
        finally:
            os.close(descriptor)


def copy_side_files(source: Path, files: Iterable[Path], folder: Path, keep: Iterable[str] = ()) -> None:
    """Copy files given relative to `source` into `folder`, except those named in `keep`."""
    kept = set(keep)
    for file in files:
        if str(file) not in kept:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file, so that a full disk shows at once; where the file system cannot, only set the size.

    `posix_fallocate` is no substitute: without support of the file system it writes every block.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    reserve = getattr(libc, "fallocate", None)
    if reserve is not None:
        if reserve(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)
