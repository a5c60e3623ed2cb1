"""Sidecar index of a tar shard: where each member lies, its checksum, and how many tokens each sample has.

`shard-000000.tar` has `shard-000000.index.npz` beside it, a compressed NumPy archive without pickles. NumPy because a set of
millions of samples loads as a few arrays without parsing, and compressed because offsets and sizes are repetitive. Arrays:

    meta            bytes [J]     UTF-8 JSON: version, tar (file name), tar_size (bytes), tokenizer (fingerprint)
    key             S [N]         sample keys in the shard's order
    key_hash        uint64 [N]    `order.hash_of_key(key)`; decides what is held out
    kind            S [N]         text, figure, table
    tokens          int64 [N]     ids of the sample's text, without the end-of-text token
    member_sample   int64 [M]     the sample that a member belongs to
    member_name     S [M]         extension of the member: txt, json, png
    member_offset   int64 [M]     first byte of its content in the tar
    member_size     int64 [M]     bytes
    member_crc32    uint32 [M]    zlib.crc32 of its content
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError

VERSION = 1
SUFFIX = ".index.npz"
TEXT_MEMBER = b"txt"
_ARRAYS = ("key", "key_hash", "kind", "tokens", "member_sample", "member_name", "member_offset", "member_size", "member_crc32")


@dataclass(frozen=True)
class ShardIndex:
    """The arrays of the module's docstring, and the fields of `meta`."""

    tar: str
    tar_size: int
    tokenizer: str
    key: np.ndarray
    key_hash: np.ndarray
    kind: np.ndarray
    tokens: np.ndarray
    member_sample: np.ndarray
    member_name: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    member_crc32: np.ndarray

    def texts(self) -> np.ndarray:
        """int64 [N]: the text member of every sample.

        Raises:
            InputError: a sample has none, or more than one.
        """
        members = np.flatnonzero(self.member_name == TEXT_MEMBER)
        owners = self.member_sample[members]
        order = np.argsort(owners, kind="stable")
        if not np.array_equal(owners[order], np.arange(len(self.key))):
            raise InputError(f"The index of {self.tar} does not give every sample exactly one .txt member; build it again.")
        return members[order]


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + SUFFIX)


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write an index beside its shard; the bytes depend on the content alone."""
    meta: dict[str, Any] = {
        "version": VERSION,
        "tar": index.tar,
        "tar_size": index.tar_size,
        "tokenizer": index.tokenizer,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez_compressed(index_path(folder / index.tar), **arrays)


def read_index(tar: Path) -> ShardIndex:
    """Read the index of a shard.

    Raises:
        InputError: it is missing, damaged, of another version, or points outside its tar.
    """
    path = index_path(tar)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _ARRAYS}
            meta = json.loads(archive["meta"].tobytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; every shard needs its index.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}); build the shards again.") from None
    if meta.get("version") != VERSION:
        raise InputError(f"{path} has version {meta.get('version')}, and this program reads version {VERSION}.")
    index = ShardIndex(meta["tar"], meta["tar_size"], meta["tokenizer"], **arrays)
    samples, members = len(index.key), len(index.member_sample)
    lengths_fit = all(len(arrays[name]) == (members if name.startswith("member_") else samples) for name in _ARRAYS)
    ends = index.member_offset + index.member_size
    inside = members == 0 or (index.member_offset.min() >= 0 and index.member_size.min() >= 0 and ends.max() <= index.tar_size)
    if index.tar != tar.name or not lengths_fit or not inside:
        raise InputError(f"{path} does not belong to {tar.name}; build the shards again.")
    return index
