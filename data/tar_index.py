"""`moexpand data index`: the sidecar indexes of webdataset or energon tars that somebody else wrote, without rewriting them.

A tar is read once from its beginning to its end, never extracted. Members that a model may read are pictures (png, jpg, jpeg,
webp), a text (.txt, or a key of .json) and .parts.json; all others (.pyd, .npy, .cls, ...) are left alone, now and in training.
"""

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, write_json
from moexpand.data.dataset import PARTS_MEMBER, SUMMARY, TEXT_MEMBER, is_image, summary_of
from moexpand.data.image_decode import BadImage, image_size
from moexpand.data.index import IndexedSample, Member, ShardIndex, write_index
from moexpand.data.parts import Part, check_parts, encode_text
from moexpand.data.shards import cached_tokenizer, shard_entry
from moexpand.data.tally import Tally
from moexpand.data.units import LETTERS

JSON_MEMBER = "json"
MAX_MEMBER = 1 << 30


@dataclass
class _Group:
    """Neighbouring members with one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    twice: bool = False


class _Unusable(Exception):
    """The reason why a sample is left out."""


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
            say(f"{indexed.entry['name']}: {indexed.entry['samples']} samples, {indexed.entry['tokens']} tokens")
    bad = sum(tally.dropped.values())
    if bad > max_bad_fraction * tally.input or not entries:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.dropped.items()))
        raise InputError(
            f"{bad} of {tally.input} samples in {folder} cannot be used ({reasons or 'there is none'}), and"
            f" max_bad_fraction={max_bad_fraction} allows {int(max_bad_fraction * tally.input)}."
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


def _index_tar(job: tuple[Path, str, str, str]) -> _Indexed:
    folder, tar, tokenizer_name, text_key = job
    tokenizer = cached_tokenizer(tokenizer_name)
    tally, kinds, samples, seen = Tally(), Counter[str](), [], set[str]()
    for group in _groups(folder / tar):
        try:
            if group.key in seen:
                raise _Unusable("scattered_key")
            seen.add(group.key)
            parts, meta = _content(group, text_key)
            images = tuple(image_size(group.contents[part["image"]]) for part in parts if "image" in part)
            kind = meta.get("kind") if isinstance(meta.get("kind"), str) else None
            kind = kind if kind in LETTERS else "image" if images else "text"
            tokens = len(encode_text(parts, tokenizer).ids)
            samples.append(IndexedSample(group.key, kind, tokens, tuple(group.members.values()), images))
        except _Unusable as reason:
            tally.drop(str(reason))
        except BadImage as problem:
            tally.drop(f"image_{problem.reason}")
        else:
            tally.keep()
            kinds[kind] += 1
    size = (folder / tar).stat().st_size
    index = ShardIndex.of_samples(tar, size, tokenizer.fingerprint, samples, text_key)
    with disk_errors(f"writing the index of {folder / tar}"):
        write_index(folder, index)
    return _Indexed(shard_entry(index), tally.as_json(), kinds)


def _content(group: _Group, text_key: str) -> tuple[list[Part], dict[str, Any]]:
    """Parts of a sample and its .json member."""
    if group.twice:
        raise _Unusable("member_twice")
    meta = _json(group.contents[JSON_MEMBER]) if JSON_MEMBER in group.contents else {}
    if PARTS_MEMBER in group.contents:
        parts = _json(group.contents[PARTS_MEMBER])
        try:
            check_parts(parts)
        except InputError:
            raise _Unusable("parts") from None
        if any(part["image"] not in group.contents for part in parts if "image" in part):
            raise _Unusable("image_missing")
    else:
        parts = [{"image": name} for name in sorted(group.contents) if is_image(name)]
        if TEXT_MEMBER in group.contents:
            try:
                parts.append({"text": group.contents[TEXT_MEMBER].decode()})
            except UnicodeDecodeError:
                raise _Unusable("not_utf8") from None
        elif isinstance(meta, dict) and isinstance(meta.get(text_key), str):
            parts.append({"text": meta[text_key]})
        else:
            raise _Unusable("no_text")
    if not any(part.get("text", "").strip() for part in parts):
        raise _Unusable("empty")
    return parts, meta if isinstance(meta, dict) else {}


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _Unusable("not_json") from None


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
    if extension not in (TEXT_MEMBER, JSON_MEMBER, PARTS_MEMBER) and not is_image(extension):
        return
    if member.size > MAX_MEMBER:
        return
    stream = tar.extractfile(member)
    content = stream.read() if stream is not None else b""
    group.twice |= extension in group.members
    group.members[extension] = Member(extension, member.offset_data, member.size, zlib.crc32(content))
    group.contents[extension] = content
