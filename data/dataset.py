"""A folder of shards opened for reading: dataset.json, every index, random access to samples, and the count of bad ones."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.index import ShardIndex, index_name, parse_index
from moexpand.data.parts import Part, check_parts, is_series
from moexpand.data.storage import Storage, open_storage
from moexpand.data.tally import Tally
from moexpand.data.tokens import Tokenizer

SUMMARY = "dataset.json"
FORMAT_VERSION = 2
PARTS_MEMBER = "parts.json"
TEXT_MEMBER = "txt"
IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")


def is_image(member: str) -> bool:
    """Whether a member of this extension is a picture; `0.png` is one of several."""
    return member.rsplit(".", 1)[-1].lower() in IMAGE_MEMBERS


def series_members(members: Iterable[str]) -> list[str]:
    """Those that can be time series, in their order: npy, or 0.npy, 1.npy, ..., 10.npy."""
    return sorted(filter(is_series, members), key=lambda name: (len(name), name))


def read_summary(storage: Storage) -> dict[str, Any]:
    """dataset.json of a shard folder.

    Raises:
        InputError: the folder or the file is missing, damaged or of another version.
    """
    where = f"{storage.place}/{SUMMARY}"
    try:
        summary = json.loads(storage.read(SUMMARY))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{storage.place} is not a folder of shards: it has no {SUMMARY}; write one with `moexpand data build`, or with"
            " `moexpand data index` for tars of your own."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from None
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where} has the format version {version}; this program reads {FORMAT_VERSION}: build the shards again."
        )
    return summary


def summary_of(
    tokenizer: Tokenizer,
    shards: list[dict[str, Any]],
    kinds: Mapping[str, int],
    stages: Mapping[str, Tally],
    sources: Sequence[dict[str, str]] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of dataset.json.

    Args:
        tokenizer: that the shards were indexed with.
        shards: what `shards.shard_entry` says of each.
        kinds: samples of each kind.
        stages: what each stage took in, kept and dropped.
        sources: name, format and SHA-256 of each file; none where the tars are somebody else's.
        options: that decide the bytes.
    """
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        # Shards written before there were series say nothing of them.
        **{total: sum(shard.get(total, 0) for shard in shards) for total in ("samples", "tokens", "images", "series")},
        "kinds": dict(sorted(kinds.items())),
        "stages": {stage: tally.as_json() for stage, tally in stages.items()},
        "sources": list(sources),
        "options": dict(options or {}),
        "shards": shards,
    }


@dataclass(frozen=True)
class Content:
    """What a sample holds: its parts, and the bytes of the images and series that they name, in their order, where asked for."""

    parts: list[Part]
    images: list[bytes]
    series: list[bytes]


class Unreadable(Exception):
    """A sample that cannot be used; the text says which one and why."""


class Corpus:
    """All samples of a shard folder, numbered from 0 in the order of dataset.json.

    Attributes:
        tokens: int64 [N], ids of every sample's text, without the end-of-text token.
        key, kind: S [N].
        key_hash: uint64 [N].
        shard: int64 [N].
        image_first: int64 [N + 1], the images of every sample.
        image_height, image_width: int32 [I], pixels.
        series_first: int64 [N + 1], the time series of every sample.
        series_points: int64 [S].
        series_rate: float64 [S], sampling rate in Hz.
        bad: key of every unreadable sample met so far -> what is wrong with it.
    """

    def __init__(self, place: str | Path, max_bad_fraction: float = 0.0, cache: Path | None = None, cache_bytes: int = 0) -> None:
        self.place = str(place)
        self._storage = open_storage(self.place, cache, cache_bytes)
        summary = read_summary(self._storage)
        self.tokenizer_name: str = summary["tokenizer"]["name"]
        self.fingerprint: str = summary["tokenizer"]["fingerprint"]
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[str, str] = {}
        self._names = [shard["name"] for shard in summary["shards"]]
        indexes = [self._index(shard) for shard in summary["shards"]]
        if not indexes or not sum(len(index.key) for index in indexes):
            raise InputError(f"{self.place} holds no sample.")
        self._text_key = [index.text_key for index in indexes]
        self.shard = np.repeat(np.arange(len(indexes)), [len(index.key) for index in indexes])
        for name in ("key", "key_hash", "kind", "tokens", "image_height", "image_width", "series_points", "series_rate"):
            setattr(self, name, np.concatenate([getattr(index, name) for index in indexes]))
        for name in ("member_name", "member_offset", "member_size", "member_crc32"):
            setattr(self, f"_{name}", np.concatenate([getattr(index, name) for index in indexes]))
        self.image_first = _joined([index.image_first for index in indexes])
        self.series_first = _joined([index.series_first for index in indexes])
        self._member_first = _joined([index.member_first for index in indexes])
        for number, index in enumerate(indexes):
            self._check_size(number, index.tar_size)

    key: np.ndarray
    key_hash: np.ndarray
    kind: np.ndarray
    tokens: np.ndarray
    image_height: np.ndarray
    image_width: np.ndarray
    series_points: np.ndarray
    series_rate: np.ndarray
    _member_name: np.ndarray
    _member_offset: np.ndarray
    _member_size: np.ndarray
    _member_crc32: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def name(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self._path(self.shard[sample])}: {self.key[sample].decode()}"

    def content(self, sample: int, images: bool = False, series: bool = False) -> Content:
        """Parts of a sample, with `images` the bytes of its pictures, and with `series` those of its time series.

        Raises:
            Unreadable: a member is damaged, missing, or holds something else than it should.
        """
        span = range(self._member_first[sample], self._member_first[sample + 1])
        members = {self._member_name[member].decode(): member for member in span}
        parts = self._parts(sample, members)
        named = {
            kind: [self._named(sample, members, kind, part[kind]) for part in parts if wanted and kind in part]
            for kind, wanted in (("image", images), ("series", series))
        }
        return Content(parts, named["image"], named["series"])

    def text(self, sample: int) -> str:
        """All text of a sample, as one string.

        Raises:
            Unreadable: likewise.
        """
        return "".join(part.get("text", "") for part in self.content(sample).parts)

    def set_aside(self, sample: int | str, problem: str) -> None:
        """Count a sample, given by number or key, as bad.

        Raises:
            InputError: more samples are bad than `max_bad_fraction` allows.
        """
        self.bad[sample if isinstance(sample, str) else self.key[sample].decode()] = problem
        if len(self.bad) > self.max_bad_fraction * len(self):
            allowed = f"data.max_bad_fraction={self.max_bad_fraction} allows {int(self.max_bad_fraction * len(self))}"
            raise InputError(f"{problem} {len(self.bad)} of {len(self)} samples are unreadable, and {allowed}.")

    def _named(self, sample: int, members: dict[str, int], kind: str, name: str) -> bytes:
        if name not in members:
            raise Unreadable(f"The sample {self.name(sample)} names the {kind} {name!r}, which it does not hold.")
        return self._read(sample, members[name])

    def _parts(self, sample: int, members: dict[str, int]) -> list[Part]:
        if PARTS_MEMBER in members:
            parts = self._json(sample, members[PARTS_MEMBER])
            try:
                check_parts(parts)
            except InputError as error:
                raise Unreadable(f"The sample {self.name(sample)} has parts that cannot be used: {error}") from None
            return parts
        # The index of others' tars names a .npy member only where it is a time series.
        rates = self.series_rate[self.series_first[sample] : self.series_first[sample + 1]].tolist()
        before: list[Part] = [{"image": name} for name in sorted(members) if is_image(name)]
        before += [{"series": name, "rate": rate} for name, rate in zip(series_members(members), rates, strict=False)]
        if TEXT_MEMBER in members:
            content = self._read(sample, members[TEXT_MEMBER])
            try:
                return [*before, {"text": content.decode()}]
            except UnicodeDecodeError:
                raise Unreadable(f"The member {TEXT_MEMBER} of {self.name(sample)} is not UTF-8.") from None
        text_key = self._text_key[self.shard[sample]]
        if text_key is not None and "json" in members:
            record = self._json(sample, members["json"])
            if isinstance(record, dict) and isinstance(record.get(text_key), str):
                return [*before, {"text": record[text_key]}]
        raise Unreadable(f"The sample {self.name(sample)} holds no text.")

    def _json(self, sample: int, member: int) -> Any:
        try:
            return json.loads(self._read(sample, member))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise Unreadable(f"The member {self._member_name[member].decode()} of {self.name(sample)} is not JSON.") from None

    def _read(self, sample: int, member: int) -> bytes:
        """Content of a member, checked against its CRC32."""
        offset, size = int(self._member_offset[member]), int(self._member_size[member])
        tar = self._names[self.shard[sample]]
        try:
            content = self._storage.read_range(tar, offset, size)
        except FileNotFoundError:
            raise InputError(f"The shard {self._path(self.shard[sample])} has disappeared.") from None
        if len(content) == size and zlib.crc32(content) == self._member_crc32[member]:
            return content
        what = f"The member {self.key[sample].decode()}.{self._member_name[member].decode()} of {self._path(self.shard[sample])}"
        if len(content) != size:
            raise Unreadable(f"{what} is not whole: the shard ends inside it.")
        raise Unreadable(f"{what} does not have the CRC32 of its index: it is damaged.")

    def _path(self, shard: int) -> str:
        return f"{self.place}/{self._names[shard]}"

    def _index(self, shard: dict[str, Any]) -> ShardIndex:
        name = shard["name"]
        where = f"{self.place}/{index_name(name)}"
        try:
            content = self._storage.read(index_name(name))
        except FileNotFoundError:
            raise InputError(f"{where} does not exist; every shard needs its index.") from None
        index = parse_index(content, name, where)
        if index.tokenizer != self.fingerprint or len(index.key) != shard["samples"]:
            raise InputError(f"{where} does not agree with {self.place}/{SUMMARY}; build the shards again.")
        return index

    def _check_size(self, shard: int, expected: int) -> None:
        """A shard of another size than its index says: samples beyond its end are bad, a longer one is another file."""
        path = self._path(shard)
        try:
            size = self._storage.size(self._names[shard])
        except FileNotFoundError:
            raise InputError(f"The shard {path} does not exist, and {SUMMARY} names it.") from None
        if size == expected:
            return
        if size > expected or self.max_bad_fraction == 0.0:
            state = "truncated" if size < expected else "another file"
            raise InputError(f"The shard {path} has {size} bytes, and its index says {expected}: it is {state}.")
        beyond = np.flatnonzero(self._member_offset + self._member_size > size)
        owners = np.unique(np.searchsorted(self._member_first, beyond, side="right") - 1)
        for sample in owners[self.shard[owners] == shard]:
            self.set_aside(sample, f"The shard {path} ends before {self.key[sample].decode()} does: it is truncated.")


def _joined(firsts: list[np.ndarray]) -> np.ndarray:
    """Offsets of several shards as one array: [N1 + 1], [N2 + 1] -> [N1 + N2 + 1]."""
    shifts = np.cumsum([0, *(first[-1] for first in firsts)])
    return np.concatenate([[0], *(first[1:] + shift for first, shift in zip(firsts, shifts[:-1], strict=True))])
