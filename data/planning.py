"""The endless sequence of packs of one source: epochs of windows of packs, any of them found by planning its own window alone.

The samples of an epoch stand in an order that (seed, epoch) decides and are packed window by window. How many packs the windows
before it have is all that is needed to find a pack; these counts are kept in a file, so that going on at a far step plans one
window.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from moexpand.base.errors import EnvironmentFailure
from moexpand.base.files import write_atomic
from moexpand.data.order import Shuffle, permutation
from moexpand.data.packing import PACKING, Plan, count_packs, plan_window

WINDOW = 65536
"""Samples that are packed together; a window loses at most about one pack to padding."""
PLANS_HELD = 3


class Order(Protocol):
    """Which samples the windows of an epoch hold."""

    windows: int
    """Of an epoch; the same for all epochs."""
    name: str
    """Says what the order follows from, for the fingerprint of a plan."""

    def samples(self, epoch: int, window: int) -> np.ndarray:
        """int64 [n], in the order of the epoch."""


class SampleOrder:
    """Every window is a random choice of all samples: best mixed, and reads of a window go to all shards."""

    def __init__(self, count: int, seed: int, window: int = WINDOW) -> None:
        self.name = f"samples {count} {seed} {window}"
        self.windows = -(-count // window)
        self._count, self._seed, self._window = count, seed, window

    def samples(self, epoch: int, window: int) -> np.ndarray:
        """See `Order`."""
        begin = window * self._window
        places = np.arange(begin, min(begin + self._window, self._count))
        return Shuffle(self._count, self._seed, epoch, "samples")(places)


class ShardOrder:
    """Every window is a random choice of whole shards, shuffled: reads of a window stay in a few shards, as remote storage needs.

    Args:
        shard: int64 [N], the shard of every sample, ascending.
        seed: decides the order.
        window: samples of a window, about.
    """

    def __init__(self, shard: np.ndarray, seed: int, window: int = WINDOW) -> None:
        _, self._first = np.unique(shard, return_index=True)
        self._first = np.append(self._first, len(shard))
        shards = len(self._first) - 1
        self._together = max(1, round(window * shards / max(len(shard), 1)))
        self.windows = -(-shards // self._together)
        self.name = f"shards {hashlib.sha256(self._first.tobytes()).hexdigest()} {seed} {self._together}"
        self._seed = seed

    def samples(self, epoch: int, window: int) -> np.ndarray:
        """See `Order`."""
        order = permutation(len(self._first) - 1, self._seed, epoch, "shards")
        chosen = order[window * self._together : (window + 1) * self._together]
        samples = np.concatenate([np.arange(self._first[shard], self._first[shard + 1]) for shard in chosen])
        return samples[permutation(len(samples), self._seed, epoch, window, "samples")]


class PackSequence:
    """Packs 0, 1, 2, ... of a source, without end.

    Args:
        lengths: int64 [N], tokens of every sample, end-of-text token included; all positive.
        order: of the N samples.
        seq_length: tokens of a pack.
        seed: decides the order of the packs of a window.
        vision: int64 [N], tokens of images and series of each sample; None where there are none. They decide which pack a sample
            is in and not how many packs there are.
        folder: where counts of packs are kept between runs; None, or a folder that cannot be written: they are counted again.
        fingerprint: of the lengths; None computes it.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Order,
        seq_length: int,
        seed: int,
        folder: Path | None = None,
        fingerprint: str | None = None,
        vision: np.ndarray | None = None,
    ) -> None:
        self._lengths, self._order, self._seq_length, self._seed = lengths, order, seq_length, seed
        self._vision = vision
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        said = f"{PACKING} {fingerprint or hashlib.sha256(lengths.tobytes()).hexdigest()} {order.name} {seq_length} {seed}"
        self._file = folder / f"packs-{hashlib.sha256(said.encode()).hexdigest()[:20]}.npy" if folder else None
        # Packs of windows 0, 1, ... of all epochs, as far as they are known, and the number of packs before each.
        self._packs = self._read()
        self._before = np.concatenate([[0], np.cumsum(self._packs)])

    def locate(self, pack: int) -> tuple[int, int, int]:
        """(epoch, window, pack of the window) of a pack of the sequence."""
        self._count_until(lambda: self._before[-1] > pack)
        number = int(np.searchsorted(self._before, pack, side="right")) - 1
        epoch, window = divmod(number, self._order.windows)
        return epoch, window, pack - int(self._before[number])

    def epochs_before(self, pack: int) -> float:
        """How often the samples have been read when packs 0 ... pack - 1 are done."""
        epoch, window, place = self.locate(pack)
        number = epoch * self._order.windows + window
        return epoch + (window + place / int(self._packs[number])) / self._order.windows

    def segments(self, pack: int) -> list[tuple[int, int, int]]:
        """(sample, start, length) of every segment of a pack."""
        epoch, window, place = self.locate(pack)
        return self.window(epoch, window).segments(place)

    def window(self, epoch: int, window: int) -> Plan:
        """The packs of a window."""
        number = epoch * self._order.windows + window
        if number not in self._plans:
            samples = self._order.samples(epoch, window)
            key = (self._seed, epoch, window, "packs")
            vision = None if self._vision is None else self._vision[samples]
            self._plans[number] = plan_window(samples, self._lengths[samples], self._seq_length, *key, vision=vision)
            while len(self._plans) > PLANS_HELD:
                self._plans.popitem(last=False)
        self._plans.move_to_end(number)
        return self._plans[number]

    def epoch(self, epoch: int) -> list[Plan]:
        """The windows of an epoch, all at once."""
        return [self.window(epoch, window) for window in range(self._order.windows)]

    def packs_of_epoch(self, epoch: int) -> int:
        """How many packs an epoch has; epochs may differ by a few."""
        last = (epoch + 1) * self._order.windows
        self._count_until(lambda: len(self._packs) >= last)
        return int(self._before[last] - self._before[last - self._order.windows])

    def _count_until(self, done: Callable[[], bool]) -> None:
        known = len(self._packs)
        while not done():
            self._count_a_window()
        if len(self._packs) > known:
            self._write()

    def _count_a_window(self) -> None:
        epoch, window = divmod(len(self._packs), self._order.windows)
        samples = self._order.samples(epoch, window)
        packs = count_packs(self._lengths[samples], self._seq_length)
        self._packs = np.append(self._packs, packs)
        self._before = np.append(self._before, self._before[-1] + packs)

    def _read(self) -> np.ndarray:
        """Counts of an earlier run; a damaged file counts for nothing."""
        if self._file is not None:
            try:
                packs = np.load(self._file, allow_pickle=False)
                if packs.dtype == np.int64 and packs.ndim == 1 and (packs > 0).all():
                    return packs
            except (OSError, ValueError, EOFError):
                pass
        return np.zeros(0, dtype=np.int64)

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.save(content, self._packs)
            write_atomic(self._file, content.getvalue())
        except (OSError, EnvironmentFailure):  # a read-only folder, or a full disk: the counts are a convenience
            self._file = None
