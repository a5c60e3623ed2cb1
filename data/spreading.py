"""Pictures spread over the packs of a window, without another pack and without cutting anything.

Best-fit puts the longest samples in the first packs and what is short, as many pictures are, together in the last ones; the rank
that gets such a pack would be waited for. Here pictures of a pack with many change places with texts of a pack with few, where
both still fit. Packs are nearly full, so the lengths that change places have to agree within the few tokens of room that both
have: all sums of lengths that some choice of samples has are looked at, as the bits of one number.
"""

import heapq
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np

from moexpand.data.order import permutation

TRIES = 32
"""Packs that are looked at for an exchange of a pack at the level; more for a fuller one, by the square."""
MOST_TRIES = 1024
CHOICES = 64
"""Samples of a pack that an exchange chooses from."""
OWN_TEXTS = 3
"""Texts of the pack with many pictures that may go with them."""
NEAR = 0.1
"""An exchange that moves what is wanted but for this part of it is taken without looking further."""
WORTH = 0.125
"""Least part of what a pack has beyond the level that an exchange takes off."""
LEVEL = 1.5
"""Packs with fewer tokens of pictures than this many times the mean are left: a rank has several packs."""


def spread(pack_of: np.ndarray, lengths: np.ndarray, vision: np.ndarray, capacity: int) -> np.ndarray:
    """Exchange until no pack has more tokens of pictures than `LEVEL` times the mean, or nothing found makes it lighter.

    Args:
        pack_of: int64 [N], the pack of every chunk.
        lengths: int64 [N].
        vision: int64 [N], tokens of images of each; those of time series count with them, here and below.
        capacity: of every pack.

    Returns:
        int64 [N], the new packs; as many as before.
    """
    packs = _Packs(pack_of, lengths, vision, capacity)
    level = LEVEL * float(packs.load.mean())
    heaviest = [(-load, pack) for pack, load in enumerate(packs.load.tolist()) if load > level]
    heapq.heapify(heaviest)
    while heaviest:
        load, heavy = heapq.heappop(heaviest)
        light = packs.lighten(heavy, level) if packs.load[heavy] == -load else None
        if light is not None:
            for pack in (heavy, light):
                if packs.load[pack] > level:
                    heapq.heappush(heaviest, (-float(packs.load[pack]), pack))
    return packs.pack_of


class Exchange(NamedTuple):
    """Chunks that leave the pack with many pictures; the texts that the other gives for them follow from their lengths."""

    heavy: int
    light: int
    pictures: list[int]
    texts: tuple[int, ...]


class _Packs:
    """The packs as lists of chunks, with the room and the tokens of pictures of each."""

    def __init__(self, pack_of: np.ndarray, lengths: np.ndarray, vision: np.ndarray, capacity: int) -> None:
        count = int(pack_of.max()) + 1
        self.pack_of = pack_of.copy()
        self.load = np.bincount(pack_of, weights=vision, minlength=count)
        self._lengths, self._vision = lengths.tolist(), vision.tolist()
        self._room = (capacity - np.bincount(pack_of, weights=lengths, minlength=count)).astype(np.int64).tolist()
        self._texts: list[list[int]] = [[] for _ in range(count)]
        self._pictures: list[list[int]] = [[] for _ in range(count)]
        for chunk, pack in enumerate(pack_of.tolist()):
            (self._pictures if vision[chunk] else self._texts)[pack].append(chunk)
        self._sums_of_texts: dict[int, int] = {}
        self._turns: list[int] = []

    def lighten(self, heavy: int, level: float) -> int | None:
        """Exchange pictures of a pack for texts of a lighter one, which is returned; None where no exchange found is worth it."""
        pictures = self._pictures[heavy][:CHOICES]
        sums = self._sums(pictures)[-1]
        per_token = sum(self._vision[chunk] for chunk in pictures) / sum(self._lengths[chunk] for chunk in pictures)
        texts = self._texts[heavy][:OWN_TEXTS]
        along = [chosen for size in range(len(texts) + 1) for chosen in combinations(texts, size)]
        with_lengths = [(chosen, sum(self._lengths[chunk] for chunk in chosen)) for chosen in along]
        load = float(self.load[heavy])
        most = load - WORTH * (load - level)

        best: Exchange | None = None
        for tried, light in enumerate(self._in_turn(min(round(TRIES * (load / level) ** 2), MOST_TRIES))):
            wanted = (load - float(self.load[light])) / 2
            if light == heavy or wanted <= 0:
                continue
            aim = round(wanted / per_token)
            fitting = self._fitting(heavy, light)
            for chosen, length in with_lengths:
                moved = _nearest(sums & (fitting >> length), aim)
                # As far as tokens of pictures go with lengths; the choice itself is looked at where this is promising.
                if not moved or load - wanted + abs(moved - aim) * per_token >= most:
                    continue
                going = self._choice(pictures, moved)
                seen = sum(self._vision[chunk] for chunk in going)
                fuller = float(max(load - seen, self.load[light] + seen))
                if fuller < most:
                    best, most = Exchange(heavy, light, going, chosen), fuller
            if best is not None and (tried >= TRIES or most <= load - (1 - NEAR) * wanted):
                break
        if best is None:
            return None
        self._exchange(best)
        return best.light

    def _in_turn(self, tries: int) -> Iterator[int]:
        """Packs of the lighter half; all have their turn, because neighbours hold samples of like lengths."""
        for _ in range(tries):
            if not self._turns:
                half = np.argsort(self.load, kind="stable")[: max(len(self.load) // 2, 2)]
                self._turns = half[permutation(len(half), "turns")].tolist()
            yield self._turns.pop()

    def _fitting(self, heavy: int, light: int) -> int:
        """Bit n: n tokens of the pack with many pictures can go to the other, for some of its texts."""
        if light not in self._sums_of_texts:
            self._sums_of_texts[light] = self._sums(self._texts[light][:CHOICES])[-1]
        bits, width = self._sums_of_texts[light], self._room[heavy] + self._room[light] + 1
        done = 1
        while done < width:
            step = min(done, width - done)
            bits |= bits << step
            done += step
        return bits >> self._room[heavy]

    def _exchange(self, exchange: Exchange) -> None:
        heavy, light, pictures, along = exchange
        out = sum(self._lengths[chunk] for chunk in (*pictures, *along))
        # Texts of the other pack that leave room for `out` there and fit into the room that it leaves here.
        least = max(out - self._room[light], 0)
        sums = self._sums_of_texts[light] >> least
        back = least + (sums & -sums).bit_length() - 1
        texts = self._choice(self._texts[light][:CHOICES], back)
        for chunks, going, source, target in (
            (self._pictures, pictures, heavy, light),
            (self._texts, along, heavy, light),
            (self._texts, texts, light, heavy),
        ):
            chunks[source] = [chunk for chunk in chunks[source] if chunk not in going]
            chunks[target] += going
            self.pack_of[list(going)] = target
        for pack, more in ((heavy, back - out), (light, out - back)):
            self._room[pack] -= more
            self._sums_of_texts.pop(pack, None)
        seen = sum(self._vision[chunk] for chunk in pictures)
        self.load[heavy] -= seen
        self.load[light] += seen

    def _sums(self, chunks: list[int]) -> list[int]:
        """Entry k, bit n: some of the first k chunks have n tokens together."""
        sums = [1]
        for chunk in chunks:
            sums.append(sums[-1] | sums[-1] << self._lengths[chunk])
        return sums

    def _choice(self, chunks: list[int], total: int) -> list[int]:
        """Some of these chunks that have `total` tokens together."""
        sums = self._sums(chunks)
        chosen = []
        for number in range(len(chunks) - 1, -1, -1):
            if not sums[number] >> total & 1:
                chosen.append(chunks[number])
                total -= self._lengths[chunks[number]]
        return chosen


def _nearest(bits: int, aim: int) -> int:
    """The number of the set bit nearest to `aim`, bit 0 apart; 0 where there is none."""
    below = (bits & ((2 << aim) - 1) & ~1).bit_length() - 1
    above = bits >> aim
    above = aim + (above & -above).bit_length() - 1 if above else 0
    if below <= 0 or above <= 0:
        return max(below, above, 0)
    return below if aim - below <= above - aim else above
