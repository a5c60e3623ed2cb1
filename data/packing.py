"""Planned packing: which samples share a sequence is computed from their lengths, before any text is read.

Samples stand in an order that (seed, epoch) decides. Samples longer than a pack are cut into chunks. The chunks of a window of
samples go into packs of `seq_length` by best-fit decreasing: longest chunk first, each into the fullest pack that still has
room. A window keeps planning local, so that a very large set never has to be planned as a whole; within a window the packs are
put in random order, because best-fit leaves the long samples in the first ones.
"""

from dataclasses import dataclass

import numpy as np

from moexpand.data.order import permutation

WINDOW = 16384
"""Samples that are packed together; a window loses at most about one pack to padding."""


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch, as slices of samples.

    Pack p holds the segments first[p] ... first[p + 1] - 1; segment s is the tokens start[s] ... start[s] + length[s] - 1 of
    sample sample[s] (its end-of-text token included). All arrays are int64; first has one entry more than there are packs.
    """

    first: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


def plan_epoch(lengths: np.ndarray, seq_length: int, seed: int, epoch: int, window: int = WINDOW) -> Plan:
    """Plan all packs of an epoch.

    Args:
        lengths: int64 [N], tokens of every sample, end-of-text token included; all positive.
        seq_length: tokens of a pack.
        seed: of the run.
        epoch: from 0.
        window: samples that are packed together.
    """
    order = permutation(len(lengths), seed, epoch, "samples")
    parts = []
    for number, begin in enumerate(range(0, len(order), window)):
        chosen = order[begin : begin + window]
        parts.append(_plan_window(chosen, lengths[chosen], seq_length, (seed, epoch, number)))
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Plan(np.zeros(1, dtype=np.int64), empty, empty, empty)
    sizes = np.concatenate([np.diff(part.first) for part in parts])
    return Plan(
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([part.sample for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


def _plan_window(samples: np.ndarray, lengths: np.ndarray, seq_length: int, key: tuple[int, int, int]) -> Plan:
    """Cut the samples into chunks, pack them and shuffle the packs."""
    chunks = -(-lengths // seq_length)
    owner = np.repeat(np.arange(len(samples)), chunks)
    number_in_sample = np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    start = number_in_sample * seq_length
    length = np.minimum(lengths[owner] - start, seq_length)

    pack, count = best_fit(length, seq_length)
    place = np.empty(count, dtype=np.int64)
    place[permutation(count, *key, "packs")] = np.arange(count)
    by_pack = np.argsort(place[pack], kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(place[pack], minlength=count))])
    return Plan(first, samples[owner][by_pack], start[by_pack], length[by_pack])


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing bin packing; equal lengths are taken in the order given.

    Args:
        lengths: int64 [N], each between 1 and `capacity`.
        capacity: of every pack.

    Returns:
        int64 [N], the pack of every chunk, and the number of packs.
    """
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    # Packs that are full from the start need no search.
    full = int(np.count_nonzero(lengths == capacity))
    pack_of[order[:full]] = np.arange(full)
    count = full
    # Bit r of `room` says that some pack has r tokens left; the lowest bit at or above a length is the best fit.
    room = 0
    packs_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    packs: list[int] = []
    for length in lengths[order[full:]].tolist():
        fitting = room >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with[left].pop()
            if not packs_with[left]:
                room ^= 1 << left
        else:
            left, pack = capacity, count
            count += 1
        packs.append(pack)
        left -= length
        if left:
            packs_with[left].append(pack)
            room |= 1 << left
    pack_of[order[full:]] = packs
    return pack_of, count
