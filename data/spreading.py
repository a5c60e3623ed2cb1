"""Pictures spread over the packs of a window, without another pack and without cutting anything.

Best-fit puts the longest samples in the first packs and what is short, as many pictures are, together in the last ones; the rank
that gets such a pack would be waited for. Here a text of a pack with few tokens of pictures changes places with several pictures
of a pack with many, where both still fit.
"""

import numpy as np

ATTEMPTS = 12
"""Choices of pictures for one text."""
TRIES = 16
"""Packs with few tokens of pictures that are looked at for each exchange."""


def spread(pack_of: np.ndarray, lengths: np.ndarray, vision: np.ndarray, capacity: int) -> np.ndarray:
    """Exchange until every pack has at most the mean of tokens of pictures, or nothing brings it closer to the lightest ones.

    Args:
        pack_of: int64 [N], the pack of every chunk.
        lengths: int64 [N].
        vision: int64 [N], tokens of images of each.
        capacity: of every pack.

    Returns:
        int64 [N], the new packs; as many as before.
    """
    packs = _Packs(pack_of, lengths, vision, capacity)
    mean = packs.load.mean()
    for heavy in np.argsort(-packs.load, kind="stable").tolist():
        if packs.load[heavy] <= mean:
            break
        while packs.load[heavy] > mean and packs.lighten(heavy):
            pass
    return packs.pack_of


class _Packs:
    """The packs as lists of chunks, with the room and the tokens of pictures of each."""

    def __init__(self, pack_of: np.ndarray, lengths: np.ndarray, vision: np.ndarray, capacity: int) -> None:
        count = int(pack_of.max()) + 1
        self.pack_of = pack_of.copy()
        self._lengths, self._vision = lengths.tolist(), vision.tolist()
        self.load = np.bincount(pack_of, weights=vision, minlength=count)
        self._room = (capacity - np.bincount(pack_of, weights=lengths, minlength=count)).astype(np.int64).tolist()
        self._texts: list[list[int]] = [[] for _ in range(count)]
        self._pictures: list[list[int]] = [[] for _ in range(count)]
        for chunk in np.argsort(-lengths, kind="stable").tolist():
            (self._pictures if vision[chunk] else self._texts)[pack_of[chunk]].append(chunk)

    def lighten(self, heavy: int) -> bool:
        """Exchange pictures of a pack for a text of one of the lightest; False where none brings them closer."""
        tries = min(TRIES, len(self.load) - 1)
        for light in np.argpartition(self.load, tries)[: tries + 1].tolist():
            if light == heavy:
                continue
            most = (self.load[heavy] - self.load[light]) / 2
            for text in self._texts[light]:
                pictures = self._pictures_for(heavy, self._lengths[text], self._room[light], most)
                if pictures:
                    self._exchange(heavy, light, text, pictures)
                    return True
        return False

    def _pictures_for(self, pack: int, length: int, room: int, most: float) -> list[int]:
        """Pictures of a pack that make room in it for a text of `length` and need at most `room` more than it; else none.

        Long ones are taken first, but for the longest, which is another one at every attempt.
        """
        pictures = self._pictures[pack]
        for first in range(min(len(pictures), ATTEMPTS)):
            chosen: list[int] = []
            held, seen = 0, 0
            for chunk in pictures[first:]:
                if held + self._lengths[chunk] <= length + room and seen + self._vision[chunk] <= most:
                    chosen.append(chunk)
                    held += self._lengths[chunk]
                    seen += self._vision[chunk]
            if chosen and held + self._room[pack] >= length:
                return chosen
        return []

    def _exchange(self, heavy: int, light: int, text: int, pictures: list[int]) -> None:
        moved = sum(self._lengths[chunk] for chunk in pictures) - self._lengths[text]
        seen = sum(self._vision[chunk] for chunk in pictures)
        self._room[heavy] += moved
        self._room[light] -= moved
        self.load[heavy] -= seen
        self.load[light] += seen
        self._texts[light].remove(text)
        self._texts[heavy].append(text)
        self._pictures[heavy] = [chunk for chunk in self._pictures[heavy] if chunk not in pictures]
        self._pictures[light] += pictures
        self.pack_of[[text]] = heavy
        self.pack_of[pictures] = light
