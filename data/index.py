"""Sidecar index of a tar shard: where each member lies, its checksum, each sample's tokens, its images' and series' sizes.

`shard-000000.tar` has `shard-000000.index.npz` beside it, a compressed NumPy archive without pickles. NumPy because a set of
millions of samples loads as a few arrays without parsing, and compressed because offsets and sizes are repetitive. Arrays:

    meta            bytes [J]       UTF-8 JSON: version, tar (file name), tar_size (bytes), tokenizer (fingerprint), text_key
                                    (the key of a .json member that holds the text of samples without .txt, or null)
    key             S [N]           sample keys in the shard's order
    key_hash        uint64 [N]      `order.hash_of_key(key)`; decides what is held out
    kind            S [N]           text, figure, table, equation, image, series, chat, record
    tokens          int64 [N]       ids of the sample's text, without those of images and series and without the end-of-text token
    member_first    int64 [N + 1]   the members of sample i are member_first[i] ... member_first[i + 1] - 1
    member_name     S [M]           extension of the member: txt, json, png, npy, parts.json
    member_offset   int64 [M]       first byte of its content in the tar
    member_size     int64 [M]       bytes
    member_crc32    uint32 [M]      zlib.crc32 of its content
    image_first     int64 [N + 1]   the images of sample i, in the order in which a model sees them
    image_height    int32 [I]       pixels
    image_width     int32 [I]
    series_first    int64 [N + 1]   the time series of sample i, likewise; since version 3
    series_points   int64 [S]       points of time
    series_rate     float64 [S]     sampling rate in Hz: the given one, or what stands for it (`series.sampling_rate`)
"""

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import write_atomic

VERSION = 3
WITHOUT_SERIES = 2
"""The version before; its indexes are read as such without time series."""
SUFFIX = ".index.npz"
_PER_SAMPLE = ("key", "key_hash", "kind", "tokens")
_FIRST = ("member_first", "image_first", "series_first")
_PER_MEMBER = ("member_name", "member_offset", "member_size", "member_crc32")
_PER_IMAGE = ("image_height", "image_width")
_PER_SERIES = ("series_points", "series_rate")
_ARRAYS = (*_PER_SAMPLE, *_FIRST, *_PER_MEMBER, *_PER_IMAGE, *_PER_SERIES)


@dataclass(frozen=True)
class Member:
    """One file of a sample, as a writer or a scan of a tar met it."""

    name: str
    """Extension: what follows the first dot."""
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class IndexedSample:
    """What the index says of one sample."""

    key: str
    kind: str
    tokens: int
    members: tuple[Member, ...]
    images: tuple[tuple[int, int], ...]
    """(height, width) of each, in the order in which a model sees them."""
    series: tuple[tuple[int, float], ...] = ()
    """(points, sampling rate in Hz) of each, likewise."""


@dataclass(frozen=True)
class ShardIndex:
    """The arrays of the module's docstring, and the fields of `meta`."""

    tar: str
    tar_size: int
    tokenizer: str
    text_key: str | None
    key: np.ndarray
    key_hash: np.ndarray
    kind: np.ndarray
    tokens: np.ndarray
    member_first: np.ndarray
    member_name: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    member_crc32: np.ndarray
    image_first: np.ndarray
    image_height: np.ndarray
    image_width: np.ndarray
    series_first: np.ndarray
    series_points: np.ndarray
    series_rate: np.ndarray

    @classmethod
    def of_samples(
        cls, tar: str, tar_size: int, tokenizer: str, samples: list[IndexedSample], text_key: str | None = None
    ) -> "ShardIndex":
        """The index of these samples, in their order."""
        from moexpand.data.order import hash_of_key

        members = [member for sample in samples for member in sample.members]
        images = np.array([size for sample in samples for size in sample.images], dtype=np.int32).reshape(-1, 2)
        series = [entry for sample in samples for entry in sample.series]
        return cls(
            tar=tar,
            tar_size=tar_size,
            tokenizer=tokenizer,
            text_key=text_key,
            key=np.array([sample.key.encode() for sample in samples], dtype=np.bytes_),
            key_hash=np.array([hash_of_key(sample.key) for sample in samples], dtype=np.uint64),
            kind=np.array([sample.kind.encode() for sample in samples], dtype=np.bytes_),
            tokens=np.array([sample.tokens for sample in samples], dtype=np.int64),
            member_first=np.cumsum([0, *(len(sample.members) for sample in samples)], dtype=np.int64),
            member_name=np.array([member.name.encode() for member in members], dtype=np.bytes_),
            member_offset=np.array([member.offset for member in members], dtype=np.int64),
            member_size=np.array([member.size for member in members], dtype=np.int64),
            member_crc32=np.array([member.crc32 for member in members], dtype=np.uint32),
            image_first=np.cumsum([0, *(len(sample.images) for sample in samples)], dtype=np.int64),
            image_height=images[:, 0].copy(),
            image_width=images[:, 1].copy(),
            series_first=np.cumsum([0, *(len(sample.series) for sample in samples)], dtype=np.int64),
            series_points=np.array([points for points, _ in series], dtype=np.int64),
            series_rate=np.array([rate for _, rate in series], dtype=np.float64),
        )


def index_name(tar: str) -> str:
    """File name of a shard's index."""
    return tar.removesuffix(".tar") + SUFFIX


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write an index beside its shard; the bytes depend on the content alone."""
    meta: dict[str, Any] = {
        "version": VERSION,
        "tar": index.tar,
        "tar_size": index.tar_size,
        "tokenizer": index.tokenizer,
        "text_key": index.text_key,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomic(folder / index_name(index.tar), content.getvalue())


def parse_index(content: bytes, tar: str, where: str) -> ShardIndex:
    """Read the index of a shard.

    Args:
        content: of the .index.npz file.
        tar: file name of the shard.
        where: the index file's path or address, for messages.

    Raises:
        InputError: it is damaged, of another version, or points outside its tar.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            version = meta.get("version")
            if version not in (WITHOUT_SERIES, VERSION):
                raise InputError(
                    f"{where} has version {version}, and this program reads the versions {WITHOUT_SERIES} and {VERSION};"
                    " build the shards again."
                )
            arrays = _no_series(len(archive["key"])) if version == WITHOUT_SERIES else {}
            arrays |= {name: archive[name] for name in _ARRAYS if name not in arrays}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{where} is damaged ({error}); build the shards again.") from None
    index = ShardIndex(meta["tar"], meta["tar_size"], meta["tokenizer"], meta["text_key"], **arrays)
    if index.tar != tar or not _consistent(index):
        raise InputError(f"{where} does not belong to {tar}; build the shards again.")
    return index


def _no_series(samples: int) -> dict[str, np.ndarray]:
    return {
        "series_first": np.zeros(samples + 1, dtype=np.int64),
        "series_points": np.zeros(0, dtype=np.int64),
        "series_rate": np.zeros(0, dtype=np.float64),
    }


def _consistent(index: ShardIndex) -> bool:
    """Whether the arrays' lengths agree and every member lies inside the tar."""
    samples = len(index.key)
    for name, names in zip(_FIRST, (_PER_MEMBER, _PER_IMAGE, _PER_SERIES), strict=True):
        first = getattr(index, name)
        if len(first) != samples + 1 or first[0] != 0 or (np.diff(first) < 0).any():
            return False
        if any(len(getattr(index, name)) != first[-1] for name in names):
            return False
    if any(len(getattr(index, name)) != samples for name in _PER_SAMPLE) or (index.tokens < 0).any():
        return False
    if (index.series_points < 1).any() or not (np.isfinite(index.series_rate) & (index.series_rate > 0)).all():
        return False
    ends = index.member_offset + index.member_size
    return not len(ends) or bool(
        (index.member_offset >= 0).all() and (index.member_size >= 0).all() and ends.max() <= index.tar_size
    )
