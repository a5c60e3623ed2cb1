"""Write samples as a webdataset tar with its index.

A sample with key K is the adjacent members K.json (what it is and where it comes from), its pictures (K.png, or K.0.png, K.1.jpg,
...), its time series (K.npy, or K.0.npy, ...) and its text: K.txt where the pictures come first and one plain text follows,
K.parts.json where the order, a series or the marks of what is trained on say more. Members carry no time, owner or rights, so
the same samples give the same bytes.
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

from moexpand.data.dataset import PARTS_MEMBER, TEXT_MEMBER
from moexpand.data.image_decode import image_size
from moexpand.data.index import IndexedSample, Member, ShardIndex, write_index
from moexpand.data.parts import Part, encode_text
from moexpand.data.series import sampling_rate, series_header
from moexpand.data.tokens import Tokenizer, load_tokenizer


@dataclass
class Sample:
    """One training sample before it is written."""

    key: str
    kind: str
    """text, figure, table, equation, image, series, chat or record."""
    parts: list[Part]
    meta: dict[str, Any] = field(default_factory=dict)
    """Goes to the .json member: source, page, box, caption, ..."""
    images: dict[str, Path] = field(default_factory=dict)
    """Extension of the member -> file."""
    series: dict[str, Path] = field(default_factory=dict)
    """Likewise of time series."""


@lru_cache(maxsize=2)
def cached_tokenizer(name: str) -> Tokenizer:
    """A tokenizer, loaded once a process."""
    return load_tokenizer(name)


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, samples: list[Sample], tokenizer_name: str) -> dict[str, Any]:
    """Write one tar and its index; the index comes last, so a shard that has one is whole.

    Returns:
        name, samples, tokens and bytes of the shard, for dataset.json.
    """
    tokenizer = cached_tokenizer(tokenizer_name)
    path = folder / shard_name(number)
    partial = path.with_suffix(".partial")
    indexed = []
    with open(partial, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                contents = _members(sample)
                members = [_add(tar, sample.key, extension, content) for extension, content in sorted(contents.items())]
                tokens = len(encode_text(sample.parts, tokenizer).ids)
                sizes = tuple(image_size(contents[part["image"]]) for part in sample.parts if "image" in part)
                series = tuple(series_entry(contents[part["series"]], part) for part in sample.parts if "series" in part)
                indexed.append(IndexedSample(sample.key, sample.kind, tokens, tuple(members), sizes, series))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    index = ShardIndex.of_samples(path.name, path.stat().st_size, tokenizer.fingerprint, indexed)
    write_index(folder, index)
    return shard_entry(index)


def series_entry(content: bytes, part: Part) -> tuple[int, float]:
    """What the index says of a time series: points and sampling rate.

    Raises:
        BadSeries: its file's header or its part's rate shows that it cannot be used.
    """
    points = series_header(content).points
    return points, sampling_rate(points, part.get("rate"))


def shard_entry(index: ShardIndex) -> dict[str, Any]:
    """What dataset.json says of a shard."""
    return {
        "name": index.tar,
        "samples": len(index.key),
        "tokens": int(index.tokens.sum()),
        "images": len(index.image_height),
        "series": len(index.series_points),
        "bytes": index.tar_size,
    }


def _members(sample: Sample) -> dict[str, bytes]:
    """Extension -> content of all members of a sample."""
    meta = {"kind": sample.kind} | sample.meta
    contents = {"json": _json(meta)} | {name: path.read_bytes() for name, path in (sample.images | sample.series).items()}
    plain: list[Part] = [{"image": name} for name in sorted(sample.images)]
    last = sample.parts[-1] if sample.parts else {}
    if sample.parts == [*plain, {"text": last.get("text")}]:
        contents[TEXT_MEMBER] = last["text"].encode()
    else:
        contents[PARTS_MEMBER] = _json(sample.parts)
    return contents


def _add(tar: tarfile.TarFile, key: str, extension: str, content: bytes) -> Member:
    header = tarfile.TarInfo(f"{key}.{extension}")
    header.size = len(content)
    header.mode = 0o444
    member = Member(extension, tar.offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content))
    tar.addfile(header, io.BytesIO(content))
    return member


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
