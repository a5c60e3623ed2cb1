"""Another vocabulary for the child: rows of embedding and head move with their meaning.

Two tokenizers share tokens, not ids: a special token that was appended to one sits elsewhere in the other (Intern-S1's 153,216
tokens are not a prefix of Intern-S1-Pro's 155,008). So a row is found by what its token stands for, never by its number:

* moved: a token of the parent that stands for the same bytes, in the same domain, gives its row as it is;
* averaged: a token without one that is text gets the mean of the rows of the pieces into which the parent's tokenizer splits
  it;
* filled: everything else (parts of characters, control pieces, reserved and padding rows) gets the mean of all rows of the
  parent that belong to a token. Rows of the parent beyond its tokenizer (padding) are not moved and not counted.

Means are taken in float64 and rounded once to the stored dtype. With an explicit map, "all rows that belong to a token" are
those that the map names. Embedding and head follow the same rule, each from its own rows.

Legend: V rows of the child, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.upcycle.tokenizer_files import Token, read_tokens, splitter

Source = int | tuple[int, ...] | None
"""Where a row comes from: a row of the parent, the mean of several, or the mean of all used ones."""

ReadRows = Callable[[int, int], np.ndarray]
"""Rows [first, last) of the parent's tensor, [last - first, H], in the stored dtype."""

NAMED = 5
BLOCK = 1 << 20
"""Elements of the parent that the mean of all rows takes at a time: 8 MB in float64."""


@dataclass(frozen=True)
class Growth:
    """Where every row of the child's embedding and head comes from.

    Attributes:
        size: V, rows of the child.
        parent_size: rows of the parent.
        sources: one for every row of the child.
        used: runs [start, stop) of the parent's rows that belong to a token; the mean of all is theirs.
        dropped: how many of the parent's tokens have no row in the child.
        dropped_names: the first five of them.
    """

    size: int
    parent_size: int
    sources: tuple[Source, ...]
    used: tuple[tuple[int, int], ...]
    dropped: int = 0
    dropped_names: tuple[str, ...] = ()

    @property
    def moved(self) -> int:
        """Rows that are a row of the parent."""
        return sum(isinstance(source, int) for source in self.sources)

    @property
    def averaged(self) -> int:
        """Rows that are the mean of a token's pieces."""
        return sum(isinstance(source, tuple) for source in self.sources)

    @property
    def filled(self) -> int:
        """Rows that are the mean of all used rows."""
        return sum(source is None for source in self.sources)

    def summary(self) -> str:
        """One line for the user."""
        names = ", ".join(map(repr, self.dropped_names)) + (", ..." if self.dropped > len(self.dropped_names) else "")
        dropped = f"{self.dropped:,} of the parent's without a place" + (f" ({names})" if self.dropped_names else "")
        return (
            f"vocabulary {self.parent_size:,} -> {self.size:,} rows: {self.moved:,} moved with their tokens, "
            f"{self.averaged:,} averaged from pieces, {self.filled:,} filled with the mean of all; {dropped}"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: runs [child's first row, parent's first row, length], and pieces by the child's row."""
        runs = list(_runs(self.sources))
        return {
            "size": self.size,
            "parent_size": self.parent_size,
            "moved": [[first, source, length] for first, source, length in runs if isinstance(source, int)],
            "averaged": {str(first): list(source) for first, source, _ in runs if isinstance(source, tuple)},
            "used": [list(run) for run in self.used],
            "dropped": self.dropped,
            "dropped_names": list(self.dropped_names),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Growth":
        """From parsed JSON; what is no growth is an `InputError` that names `where`."""
        try:
            sizes = value["size"], value["parent_size"], value["dropped"]
            if not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError(f"sizes {sizes} are not whole numbers")
            size, parent_size, dropped = sizes
            sources: list[Source] = [None] * size
            for first, source, length in value["moved"]:
                _put(sources, first, list(_range(source, source + length, parent_size)))
            for first, pieces in value["averaged"].items():
                _put(sources, int(first), [_pieces(pieces, parent_size)])
            used = tuple((run.start, run.stop) for run in (_range(start, stop, parent_size) for start, stop in value["used"]))
            if None in sources and not used:
                raise ValueError("rows are to be filled with the mean of no rows")
            return cls(size, parent_size, tuple(sources), used, dropped, tuple(map(str, value["dropped_names"])))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where} holds a vocabulary that moexpand did not write: {error!r}.") from error


def growth_for(
    parent: Path, parent_size: int, tokenizer: Path | None = None, vocab_size: int | None = None, vocab_map: Path | None = None
) -> Growth | None:
    """What a user's keys mean for a parent folder whose embedding has `parent_size` rows; None when nothing changes.

    Raises:
        InputError: rows would have to be guessed, or the keys contradict each other or the files.
    """
    if tokenizer is not None and vocab_map is not None:
        raise InputError("tokenizer and vocab_map both say where rows come from; give one of them.")
    if vocab_map is not None:
        return read_vocab_map(vocab_map, parent_size, vocab_size)
    size = parent_size if vocab_size is None else vocab_size
    if tokenizer is not None:
        same = size == parent_size and _meanings(parent) == _meanings(tokenizer)
        return None if same else grow(parent, tokenizer, parent_size, size)
    if size != parent_size:
        raise InputError(
            f"vocab_size={size} differs from the parent's {parent_size} rows, and which row belongs to which token is not "
            f"guessed: give the child's tokenizer as tokenizer=FOLDER ({parent} itself if the tokens stay), or vocab_map=FILE."
        )
    return None


def grow(old: Path, new: Path, old_size: int, new_size: int) -> Growth:
    """Match the tokenizer in `new` with that in `old`, the parent's.

    Args:
        old_size, new_size: rows of the parent's and of the child's embedding.

    Raises:
        InputError: a tokenizer cannot be read, or has ids beyond its embedding.
    """
    before, after = read_tokens(old), read_tokens(new)
    _check_fits(before, old_size, old, "that embedding is not this tokenizer's")
    _check_fits(after, new_size, new, f"use vocab_size={max(after, default=0) + 1} or more")
    # Several tokens may stand for the same bytes (`A` and the byte `<0x41>`): the one of the same name comes first.
    names = {(token.domain, token.name): number for number, token in before.items()}
    ids = {token.meaning: number for number, token in reversed(before.items())}
    sources: list[Source] = [None] * new_size
    for number, token in after.items():
        named = names.get((token.domain, token.name))
        same = named is not None and before[named].meaning == token.meaning
        sources[number] = named if same else ids.get(token.meaning)
    split = splitter(old)
    texts = [(number, token.text) for number, token in after.items() if sources[number] is None and token.text]
    if split is not None and texts:
        for (number, _), pieces in zip(texts, split([text for _, text in texts]), strict=True):
            sources[number] = pieces or None
    kept = {token.meaning for token in after.values()}
    dropped = [token.name for token in before.values() if token.meaning not in kept]
    return Growth(new_size, old_size, tuple(sources), _runs_of(before), len(dropped), tuple(dropped[:NAMED]))


def read_vocab_map(file: Path, old_size: int, new_size: int | None = None) -> Growth:
    """Read an explicit map: a JSON list with, for every id of the child, the parent's id, null, or a list of the parent's ids.

    Raises:
        InputError: it is no such list, an id is not the parent's, or its length is not `new_size`.
    """
    content = read_json(file)
    if not isinstance(content, list) or not content:
        raise InputError(f"{file} is not a list of the parent's token ids, one entry for every id of the child.")
    if new_size is not None and len(content) != new_size:
        raise InputError(f"{file} has {len(content)} entries and vocab_size={new_size}; a map has one entry for every row.")
    sources: list[Source] = []
    for number, entry in enumerate(content):
        ids = entry if isinstance(entry, list) else [0 if entry is None else entry]
        if not ids or not all(type(each) is int and 0 <= each < old_size for each in ids):
            raise InputError(
                f"{file}: entry {number} is {entry!r}; an entry is null, an id of the parent (0 to {old_size - 1}) or a list "
                "of such ids."
            )
        sources.append(tuple(entry) if isinstance(entry, list) else entry)
    named = {each for source in sources if source is not None for each in ((source,) if isinstance(source, int) else source)}
    if not named:
        raise InputError(f"{file} names no id of the parent, so that there is no row to start from.")
    return Growth(len(sources), old_size, tuple(sources), _runs_of(named), old_size - len(named))


# ---------------------------------------------------------------- rows


def mean_row(growth: Growth, read_rows: ReadRows) -> np.ndarray | None:
    """Mean of all used rows, [H] in the stored dtype: one more pass over the parent's tensor. None when no row needs it."""
    if not growth.filled:
        return None
    sample = read_rows(growth.used[0][0], growth.used[0][0] + 1)
    step = max(1, BLOCK // sample.size)
    total = np.zeros(sample.size)
    for start, stop in growth.used:
        for first in range(start, stop, step):
            _add(total, read_rows(first, min(stop, first + step)))
    return _rounded_once(total / sum(stop - start for start, stop in growth.used), sample.dtype)


def rows(growth: Growth, read_rows: ReadRows, mean: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the child's tensor, in the stored dtype.

    Args:
        read_rows: reads the parent's; called for runs of consecutive rows, and for each row of an averaged one.
        mean: what `mean_row` returned.
    """
    parts: list[np.ndarray] = []
    for _, source, length in _runs(growth.sources[start:stop]):
        if isinstance(source, int):
            parts.append(read_rows(source, source + length))
        elif isinstance(source, tuple):
            pieces = np.concatenate([read_rows(piece, piece + 1) for piece in source])
            total = np.zeros(pieces.shape[1])
            _add(total, pieces)
            parts.append(_rounded_once(total / len(pieces), pieces.dtype)[None])
        else:
            assert mean is not None
            parts.append(np.broadcast_to(mean, (length, *mean.shape)))
    return np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _add(total: np.ndarray, rows: np.ndarray) -> None:
    """Add rows to a float64 total one by one: numpy leaves open in which order its own sums add."""
    for row in rows.astype(np.float64):
        total += row


def _rounded_once(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float64 to `dtype`, to nearest, ties to even.

    ml_dtypes rounds float64 to bf16 by way of fp32, twice. An fp32 value that was rounded to odd (S. Boldo, G. Melquiond, 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd") makes the second rounding right.
    """
    if dtype.kind == "f":
        return values.astype(dtype)
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact_even = (single != values) & (bits & 1 == 0)
    bits[inexact_even] += np.where(np.abs(single) < np.abs(values), np.uint32(1), np.uint32(0xFFFFFFFF))[inexact_even]
    return single.astype(dtype)


# ---------------------------------------------------------------- small parts


def _runs(sources: Sequence[Source]) -> Iterator[tuple[int, Source, int]]:
    """Position, source of the first and length of runs: consecutive rows of the parent, or rows to fill."""
    first = 0
    while first < len(sources):
        source, last = sources[first], first + 1
        if not isinstance(source, tuple):
            while last < len(sources) and sources[last] == (None if source is None else source + last - first):
                last += 1
        yield first, source, last - first
        first = last


def _runs_of(ids: Any) -> tuple[tuple[int, int], ...]:
    """Runs [start, stop) that cover these ids and no others."""
    ordered = np.sort(np.fromiter(ids, dtype=np.int64))
    breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(ordered, breaks) if len(run))


def _meanings(folder: Path) -> dict[int, tuple[str, bytes]]:
    return {number: token.meaning for number, token in read_tokens(folder).items()}


def _check_fits(tokens: dict[int, Token], size: int, folder: Path, advice: str) -> None:
    if tokens and max(tokens) >= size:
        number = max(tokens)
        raise InputError(
            f"The tokenizer in {folder} has id {number} ({tokens[number].name!r}), and the embedding {size} rows; {advice}."
        )


def _range(start: Any, stop: Any, size: int) -> range:
    if not (type(start) is int and type(stop) is int and 0 <= start < stop <= size):
        raise ValueError(f"rows [{start}, {stop}) of {size}")
    return range(start, stop)


def _pieces(ids: Any, size: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or not all(type(each) is int and 0 <= each < size for each in ids):
        raise ValueError(f"pieces {ids} of {size} rows")
    return tuple(ids)


def _put(sources: list[Source], first: Any, values: Sequence[Source]) -> None:
    place = _range(first, first + len(values), len(sources))
    if any(sources[number] is not None for number in place):
        raise ValueError(f"row {first} of the child is given twice")
    sources[place.start : place.stop] = values
