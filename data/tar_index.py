"""`moexpand data index`: the sidecar indexes of webdataset or energon tars that somebody else wrote, without rewriting them.

A tar is read once from its beginning to its end, never extracted. Members that a model may read are pictures (png, jpg, jpeg,
webp), a text (.txt, or a key of .json), .parts.json, and .npy where .parts.json names it or .json gives "sampling_rate"; all
others (.pyd, .cls, other .npy, ...) are left alone, now and in training.
"""

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, write_json
from moexpand.data.attached import RATE_KEY, rates_for
from moexpand.data.dataset import PARTS_MEMBER, SUMMARY, TEXT_MEMBER, is_image, series_members, summary_of
from moexpand.data.image_decode import BadImage, image_size
from moexpand.data.index import IndexedSample, Member, ShardIndex, write_index
from moexpand.data.parts import Part, Unusable, check_parts, encode_text, is_series
from moexpand.data.series import FILE_BYTES, BadSeries, read_series, sampling_rate
from moexpand.data.shards import cached_tokenizer, shard_entry
from moexpand.data.tally import Tally
from moexpand.data.tokens import Tokenizer
from moexpand.data.units import LETTERS

JSON_MEMBER = "json"
MAX_MEMBER = 1 << 30


@dataclass
class _Group:
    """Neighbouring members with one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of members that may be time series; they are read where they are."""
    twice: set[str] = field(default_factory=set)


def index_tars(
    folder: Path, tokenizer_name: str, text_key: str, workers: int, max_bad_fraction: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write an index beside every tar below a folder, and dataset.json.

    Args:
        folder: of the tars.
        tokenizer_name: see `tokens.load_tokenizer`.
        text_key: key of the .json members that holds the text of samples without a .txt member.
        workers: processes; 0 takes one a core.
        max_bad_fraction: of the samples that may be unusable; these are left out, and counted by reason.
        say: takes a line a tar.

    Returns:
        The content of dataset.json.

    Raises:
        InputError: there is no tar, one is damaged, too many samples are unusable, or `moexpand data build` wrote the folder.
    """
    tars = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
    if not tars:
        packed = ", and compressed tars have to be unpacked first" if next(folder.rglob("*.tar.*"), None) else ""
        raise InputError(f"{folder} holds no .tar file{packed}.")
    if (folder / SUMMARY).is_file() and json.loads((folder / SUMMARY).read_bytes()).get("sources"):
        raise InputError(f"{folder} was written by `moexpand data build` and has its indexes; there is nothing to do.")
    tokenizer = cached_tokenizer(tokenizer_name)
    tally, kinds, entries = Tally(), Counter[str](), []
    first_bad = ""
    jobs = [(folder, tar, tokenizer_name, text_key) for tar in tars]
    with ExitStack() as stack:
        if workers == 1:
            done: Iterator[_Indexed] = map(_index_tar, jobs)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")))
            done = pool.map(_index_tar, jobs)
        for indexed in done:
            tally.add(indexed.tally)
            kinds.update(indexed.kinds)
            if indexed.entry["samples"]:
                entries.append(indexed.entry)
            left_out = sum(indexed.tally["dropped"].values())
            told = f"; {left_out} left out, the first is {indexed.first_bad}" if left_out else ""
            say(f"{indexed.entry['name']}: {indexed.entry['samples']} samples, {indexed.entry['tokens']} tokens{told}")
            first_bad = first_bad or indexed.first_bad
    bad = sum(tally.dropped.values())
    if bad > max_bad_fraction * tally.input or not entries:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.dropped.items()))
        raise InputError(
            f"{bad} of {tally.input} samples in {folder} cannot be used ({reasons or 'there is none'}), and"
            f" max_bad_fraction={max_bad_fraction} allows {int(max_bad_fraction * tally.input)}."
            + (f" The first is {first_bad}" if first_bad else "")
        )
    summary = summary_of(tokenizer, entries, kinds, {"samples": tally}, options={"text_key": text_key})
    write_json(folder / SUMMARY, summary)
    return summary


@dataclass(frozen=True)
class _Indexed:
    """What a process found in a tar."""

    entry: dict[str, Any]
    tally: dict[str, Any]
    kinds: Counter[str]
    first_bad: str
    """The first sample that cannot be used and why, as a sentence; empty where there is none."""


def _index_tar(job: tuple[Path, str, str, str]) -> _Indexed:
    folder, tar, tokenizer_name, text_key = job
    tokenizer = cached_tokenizer(tokenizer_name)
    tally, kinds, samples, seen = Tally(), Counter[str](), [], set[str]()
    first_bad = ""
    for group in _groups(folder / tar):
        try:
            if group.key in seen:
                raise Unusable("scattered_key", "its key comes back behind other samples")
            seen.add(group.key)
            sample = _sample(group, text_key, folder / tar, tokenizer)
        except Unusable as problem:
            tally.drop(problem.reason)
            first_bad = first_bad or f"{tar}: {group.key}: {problem.detail.rstrip('.')}."
        else:
            samples.append(sample)
            tally.keep()
            kinds[sample.kind] += 1
    size = (folder / tar).stat().st_size
    index = ShardIndex.of_samples(tar, size, tokenizer.fingerprint, samples, text_key)
    with disk_errors(f"writing the index of {folder / tar}"):
        write_index(folder, index)
    return _Indexed(shard_entry(index), tally.as_json(), kinds, first_bad)


def _sample(group: _Group, text_key: str, path: Path, tokenizer: Tokenizer) -> IndexedSample:
    parts, meta = _content(group, text_key)
    images, series = [], []
    for part in parts:
        if "image" in part:
            try:
                images.append(image_size(group.contents[part["image"]]))
            except BadImage as problem:
                raise Unusable(f"image_{problem.reason}", f"image {len(images)} ({part['image']}): {problem}") from None
        elif "series" in part:
            try:
                points = len(read_series(_array(group, part["series"], path)))
                series.append((points, sampling_rate(points, part.get("rate"))))
            except BadSeries as problem:
                sentence = problem.of(f"{len(series)} ({part['series']})")
                raise Unusable(f"series_{problem.reason}", sentence) from None
    kind = meta.get("kind") if isinstance(meta.get("kind"), str) else None
    kind = kind if kind in LETTERS else "image" if images else "series" if series else "text"
    try:
        tokens = len(encode_text(parts, tokenizer).ids)
    except InputError as error:  # markup with the place of an image or a series in it
        raise Unusable("parts", str(error)) from None
    return IndexedSample(group.key, kind, tokens, tuple(group.members.values()), tuple(images), tuple(series))


def _array(group: _Group, name: str, path: Path) -> bytes:
    """A member that is a time series after all; from now on the sample has it."""
    offset, size = group.arrays[name]
    if size > FILE_BYTES:
        raise BadSeries("too_large", f"has {size} bytes; at most {FILE_BYTES} are taken")
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    group.members[name] = Member(name, offset, size, zlib.crc32(content))
    return content


def _content(group: _Group, text_key: str) -> tuple[list[Part], dict[str, Any]]:
    """Parts of a sample and its .json member."""
    _once(group, group.contents)
    meta = _json(group, JSON_MEMBER) if JSON_MEMBER in group.contents else {}
    meta = meta if isinstance(meta, dict) else {}
    parts = _named_parts(group) if PARTS_MEMBER in group.contents else _plain_parts(group, meta, text_key)
    _once(group, [part["series"] for part in parts if "series" in part])
    if not any(part.get("text", "").strip() for part in parts):
        raise Unusable("empty", "its text is empty")
    return parts, meta


def _once(group: _Group, members: Iterable[str]) -> None:
    if twice := group.twice.intersection(members):
        raise Unusable("member_twice", f"it holds the member {min(twice)} twice")


def _named_parts(group: _Group) -> list[Part]:
    """The parts that a sample lists itself: each of its pictures has its place, and each place its picture or series."""
    parts: list[Part] = _json(group, PARTS_MEMBER)
    try:
        check_parts(parts)
    except InputError as error:
        raise Unusable("parts", str(error)) from None
    for kind, held in (("image", group.contents), ("series", group.arrays)):
        for name in (part[kind] for part in parts if kind in part):
            if name not in held:
                raise Unusable(f"{kind}_missing", f"{PARTS_MEMBER} names the {kind} {name!r}, which it does not hold")
    named = {part["image"] for part in parts if "image" in part}
    if without := sorted(name for name in group.contents if is_image(name) and name not in named):
        raise Unusable("image_unplaced", f"{PARTS_MEMBER} has no place for its image {without[0]!r}")
    return parts


def _plain_parts(group: _Group, meta: dict[str, Any], text_key: str) -> list[Part]:
    """Pictures, then series, then the text."""
    parts: list[Part] = [{"image": name} for name in sorted(group.contents) if is_image(name)]
    names = series_members(group.arrays)
    if names and RATE_KEY in meta:
        rates = rates_for(len(names), meta[RATE_KEY])
        parts += [{"series": name, "rate": rate} for name, rate in zip(names, rates, strict=True)]
    if TEXT_MEMBER in group.contents:
        try:
            parts.append({"text": group.contents[TEXT_MEMBER].decode()})
        except UnicodeDecodeError:
            raise Unusable("not_utf8", f"its member {TEXT_MEMBER} is not UTF-8") from None
    elif isinstance(meta.get(text_key), str):
        parts.append({"text": meta[text_key]})
    else:
        raise Unusable("no_text", f"it has neither a member {TEXT_MEMBER} nor a string under {text_key!r} of a .json")
    return parts


def _json(group: _Group, member: str) -> Any:
    try:
        return json.loads(group.contents[member])
    except (ValueError, RecursionError):
        raise Unusable("not_json", f"its member {member} is not JSON") from None


def _groups(path: Path) -> Iterator[_Group]:
    """The samples of a tar: neighbouring members whose names agree up to the first dot after the last slash.

    Raises:
        InputError: the tar is damaged, or ends early.
    """
    group: _Group | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                place, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not stem or not dot:
                    continue
                key = f"{place}/{stem}" if place else stem
                if group is None or group.key != key:
                    if group is not None and group.members:
                        yield group
                    group = _Group(key)
                _take(group, tar, member, extension.lower())
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} is no tar that can be read to its end: {error}.") from None
    if group is not None and group.members:
        yield group
    with open(path, "rb") as file:
        # A reader that meets an empty block takes it for the end; what stands behind it would be lost without a word.
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise InputError(f"{path} has content behind its end mark at byte {end}: it is damaged, or several tars joined.")


def _take(group: _Group, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    if is_series(extension):
        if extension in group.arrays:
            group.twice.add(extension)
        group.arrays[extension] = (member.offset_data, member.size)
        return
    if extension not in (TEXT_MEMBER, JSON_MEMBER, PARTS_MEMBER) and not is_image(extension):
        return
    if member.size > MAX_MEMBER:
        return
    stream = tar.extractfile(member)
    content = stream.read() if stream is not None else b""
    if extension in group.members:
        group.twice.add(extension)
    group.members[extension] = Member(extension, member.offset_data, member.size, zlib.crc32(content))
    group.contents[extension] = content
