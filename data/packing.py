"""Planned packing: which samples share a sequence is computed from their lengths, before any text is read.

Samples longer than a pack are cut into chunks. The chunks of a window of samples go into packs of `seq_length` by best-fit
decreasing: longest chunk first, each into the fullest pack that still has room. Within a window the packs are put in random
order, because best-fit leaves the long samples in the first ones.
"""

from dataclasses import dataclass

import numpy as np

from moexpand.data.order import permutation
from moexpand.data.spreading import spread

PACKING = 2
"""The number of these rules; with other rules a run cannot go on, and counts of packs are made anew."""


@dataclass(frozen=True)
class Plan:
    """Packs, as slices of samples.

    Pack p holds the segments first[p] ... first[p + 1] - 1; segment s is the tokens start[s] ... start[s] + length[s] - 1 of
    sample sample[s] (its end-of-text token included). All arrays are int64; first has one entry more than there are packs.
    """

    first: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def segments(self, pack: int) -> list[tuple[int, int, int]]:
        """(sample, start, length) of every segment of a pack."""
        span = slice(int(self.first[pack]), int(self.first[pack + 1]))
        return list(zip(self.sample[span].tolist(), self.start[span].tolist(), self.length[span].tolist(), strict=True))


def plan_window(
    samples: np.ndarray, lengths: np.ndarray, seq_length: int, *key: int | str, vision: np.ndarray | None = None
) -> Plan:
    """Cut the samples of a window into chunks, pack them and shuffle the packs.

    Args:
        samples: int64 [N], what `Plan.sample` calls them.
        lengths: int64 [N], tokens of each, end-of-text token included; all positive.
        seq_length: tokens of a pack.
        key: decides the order of the packs.
        vision: int64 [N], tokens of images and series of each; they are spread over the packs.
    """
    chunks = -(-lengths // seq_length)
    owner = np.repeat(np.arange(len(samples)), chunks)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * seq_length
    length = np.minimum(lengths[owner] - start, seq_length)

    pack, count = best_fit(length, seq_length)
    if vision is not None and vision.any():
        pack = spread(pack, length, vision[owner], seq_length)
    place = np.empty(count, dtype=np.int64)
    place[permutation(count, *key)] = np.arange(count)
    place = place[pack]
    by_pack = np.argsort(place.astype(np.uint32), kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=count))])
    return Plan(first, samples[owner[by_pack]], start[by_pack], length[by_pack])


def count_packs(lengths: np.ndarray, seq_length: int) -> int:
    """How many packs `plan_window` makes of samples of these lengths, without making them."""
    whole, rest = np.divmod(lengths, seq_length)
    return int(whole.sum()) + _fill(np.bincount(rest[rest > 0]), seq_length)[1]


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing bin packing; equal lengths are taken in the order given.

    Args:
        lengths: int64 [N], each between 1 and `capacity`.
        capacity: of every pack.

    Returns:
        int64 [N], the pack of every chunk, and the number of packs.
    """
    # Narrow keys sort several times faster.
    order = np.argsort((capacity - lengths).astype(np.uint16 if capacity <= 1 << 16 else np.uint32), kind="stable")
    runs, count = _fill(np.bincount(lengths, minlength=1), capacity)
    start, packs, each = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    numbers = np.arange(packs.sum()) + np.repeat(start - (np.cumsum(packs) - packs), packs)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = np.repeat(numbers, np.repeat(each, packs))
    return pack_of, count


def _fill(chunks: np.ndarray, capacity: int) -> tuple[list[tuple[int, int, int]], int]:
    """Best-fit decreasing for a count of chunks of every length.

    All chunks of one length are placed together: the fullest pack that takes one takes the next ones as well, as long as there is
    room, because it only becomes fuller. Packs with the same room left are kept as runs of neighbouring numbers.

    Args:
        chunks: int64 [longest + 1], how many chunks there are of each length.
        capacity: of every pack.

    Returns:
        Where the chunks go, longest first, as (first pack, packs, chunks for each of them), and the number of packs.
    """
    placed: list[tuple[int, int, int]] = []
    # Bit r of `room` says that some pack has r tokens left; the lowest bit at or above a length is the best fit.
    room, count = 0, 0
    runs: dict[int, list[tuple[int, int]]] = {}
    lengths = np.flatnonzero(chunks)[::-1]

    def leave(space: int, start: int, packs: int) -> None:
        nonlocal room
        if space:
            runs.setdefault(space, []).append((start, packs))
            room |= 1 << space

    for length, waiting in zip(lengths.tolist(), chunks[lengths].tolist(), strict=True):
        while waiting:
            fitting = room >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                start, packs = runs[space].pop()
                if not runs[space]:
                    room ^= 1 << space
            else:
                space, start, packs = capacity, count, -(-waiting // (capacity // length))
                count += packs
            each = space // length
            full = min(packs, waiting // each)
            if full:
                placed.append((start, full, each))
                waiting -= full * each
                leave(space - each * length, start, full)
            if full < packs and waiting:
                placed.append((start + full, 1, waiting))
                leave(space - waiting * length, start + full, 1)
                full, waiting = full + 1, 0
            if full < packs:
                leave(space, start + full, packs - full)
    return placed, count
