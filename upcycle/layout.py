"""Where every byte of a checkpoint folder goes, decided from names, dtypes and shapes before any of them exists."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors
from moexpand.upcycle.jobs import Bundle
from moexpand.upcycle.safetensors_file import ALIGNMENT, ITEM_SIZES, Shape, TensorInfo, build_header, nbytes

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Layout:
    """The shard table of a folder.

    Attributes:
        shards: names of the tensors in the order of their bytes, by file.
        sizes: bytes of each file, its header included.
        tensors: the place of every tensor, in the order in which they were given; `file` is relative to the folder.
        digest: SHA-256 of all headers: equal for equal layouts only.
    """

    shards: dict[str, list[str]]
    sizes: dict[str, int]
    tensors: dict[str, TensorInfo]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(self.sizes.values())

    def header(self, file: str) -> bytes:
        """The first bytes of a shard, up to the data of its first tensor."""
        return build_header({name: (self.tensors[name].dtype, self.tensors[name].shape) for name in self.shards[file]})[0]

    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        total = sum(info.nbytes for info in self.tensors.values())
        return {
            "metadata": {"total_size": total},
            "weight_map": {name: str(info.file) for name, info in sorted(self.tensors.items())},
        }


def parse_size(size: str | int) -> int:
    """Bytes of `5GB` (decimal units) or `5GiB` (binary units), or of a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", str(size).strip(), re.IGNORECASE)
    unit = (match[2] or "").upper().removesuffix("B") if match else ""
    count = int(float(match[1]) * UNITS[f"{unit}B" if unit else ""]) if match else 0
    if count < 1:
        raise InputError(f"{size!r} is not a size; write for instance 5GB or 512MiB.")
    return count


def plan_layout(tensors: Mapping[str, tuple[str, Shape]], bundles: Iterable[Bundle], max_shard_size: str | int = "5GB") -> Layout:
    """Distribute bundles over shards in the order given; each lies in one file, one larger than a shard in a file of its own.

    Inside a shard tensors of whole blocks come first, so that they are block-aligned.

    Args:
        tensors: (header dtype, shape) by name.
        bundles: every tensor is in exactly one of them; only their names are looked at.
        max_shard_size: largest number of tensor bytes of a file, see `parse_size`.
    """
    shards = _pack(tensors, bundles, parse_size(max_shard_size))
    layout = Layout({}, {}, {}, "")
    places: dict[str, TensorInfo] = {}
    digest = hashlib.sha256()
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names.sort(key=lambda name: _alignment_rank(*tensors[name]))
        header, ranges = build_header({name: tensors[name] for name in names})
        digest.update(header)
        layout.shards[file] = names
        layout.sizes[file] = max((stop for _, stop in ranges.values()), default=len(header))
        path = Path(file)
        places.update((name, TensorInfo(name, *tensors[name], path, *ranges[name])) for name in names)
    return Layout(layout.shards, layout.sizes, {name: places[name] for name in tensors}, digest.hexdigest())


def _pack(tensors: Mapping[str, tuple[str, Shape]], bundles: Iterable[Bundle], limit: int) -> list[list[str]]:
    """Names of the tensors of each shard."""
    shards: list[list[str]] = [[]]
    room = limit
    for bundle in bundles:
        size = sum(nbytes(*tensors[name]) for name in bundle.tensors)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].extend(bundle.tensors)
        room -= size
    return shards


def _alignment_rank(dtype: str, shape: Shape) -> tuple[bool, int]:
    """Whole blocks first, then wide elements first, so that every tensor is aligned to its element and most to blocks."""
    return nbytes(dtype, shape) % ALIGNMENT != 0, -ITEM_SIZES[dtype]


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_space(target: Path, size: int) -> None:
    """Refuse to start when the file system of `target` has less than `size` bytes free."""
    folder = existing_parent(target)
    with disk_errors(f"looking at {folder}"):
        free = shutil.disk_usage(folder).free
    if free < size:
        raise EnvironmentFailure(f"{target} needs {size:,} bytes, but only {free:,} are free on the disk of {folder}.")


def make_folders(folder: Path, file: Path) -> None:
    """Make the folders of `file` inside `folder`, which is not made: another process may have removed it for good."""
    for inside in list(file.parents)[-2::-1]:
        (folder / inside).mkdir(exist_ok=True)


def copy_side_files(source: Path, files: Iterable[Path], folder: Path, keep: Iterable[str] = ()) -> None:
    """Copy files given relative to `source` into `folder`, except those named in `keep`."""
    kept = set(keep)
    for file in files:
        if str(file) not in kept:
            make_folders(folder, file)
            shutil.copyfile(source / file, folder / file)
