"""Write samples as a webdataset tar with its index; read members back, each checked against its CRC32.

A sample with key K is the adjacent members K.json (what it is and where it comes from), K.png (its picture, if it has one) and
K.txt (the text that a model reads). Members carry no time, owner or rights, so the same samples give the same bytes. Nothing
is ever extracted by name: readers go by offset.
"""

import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.index import ShardIndex, write_index
from moexpand.data.order import hash_of_key
from moexpand.data.tokens import Tokenizer, load_tokenizer


@dataclass
class Sample:
    """One training sample before it is written."""

    key: str
    kind: str
    """text, figure or table."""
    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    """Goes to the .json member: source, page, box, caption, ..."""
    image: Path | None = None
    """A PNG file."""


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, samples: list[Sample], tokenizer_name: str) -> dict[str, Any]:
    """Write one tar and its index.

    Returns:
        name, samples, tokens and bytes of the shard, for dataset.json.
    """
    tokenizer = _tokenizer(tokenizer_name)
    path = folder / shard_name(number)
    rows: list[tuple[int, str, int, int, int]] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, sample in enumerate(samples):
            meta = {"kind": sample.kind} | sample.meta
            members = {"json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode(), "txt": sample.text.encode()}
            if sample.image is not None:
                members["png"] = sample.image.read_bytes()
            for extension, content in sorted(members.items()):
                header = tarfile.TarInfo(f"{sample.key}.{extension}")
                header.size = len(content)
                header.mode = 0o444
                rows.append((i, extension, tar.offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content)))
                tar.addfile(header, io.BytesIO(content))
    tokens = [len(tokenizer.encode(sample.text)) for sample in samples]
    owners, names, offsets, sizes, checksums = zip(*rows, strict=True)
    index = ShardIndex(
        tar=path.name,
        tar_size=path.stat().st_size,
        tokenizer=tokenizer.fingerprint,
        key=np.array([sample.key.encode() for sample in samples]),
        key_hash=np.array([hash_of_key(sample.key) for sample in samples], dtype=np.uint64),
        kind=np.array([sample.kind.encode() for sample in samples]),
        tokens=np.array(tokens, dtype=np.int64),
        member_sample=np.array(owners, dtype=np.int64),
        member_name=np.array([name.encode() for name in names]),
        member_offset=np.array(offsets, dtype=np.int64),
        member_size=np.array(sizes, dtype=np.int64),
        member_crc32=np.array(checksums, dtype=np.uint32),
    )
    write_index(folder, index)
    return {"name": path.name, "samples": len(samples), "tokens": sum(tokens), "bytes": index.tar_size}


class ShardReader:
    """Random reads from one tar by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"The shard {path} cannot be opened: {error.strerror}.") from None

    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, key: str, member: str, offset: int, size: int, crc32: int) -> bytes:
        """Content of one member.

        Raises:
            InputError: the file ends before the member does, or the content has another checksum.
        """
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise InputError(f"The shard {self.path} ends inside the member {key}.{member}: it is truncated.")
        if zlib.crc32(content) != crc32:
            raise InputError(f"The member {key}.{member} of {self.path} does not have the CRC32 of its index: it is damaged.")
        return content

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
