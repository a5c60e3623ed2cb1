"""Which source each pack comes from: a periodic schedule of the weights, in which any pack is found at once."""

from collections.abc import Sequence

import numpy as np

from moexpand.base.errors import InputError

PERIOD = 4096
"""Packs after which the schedule begins again; weights are rounded to parts of it."""


class Mixture:
    """Packs of several sources in the proportion of their weights, each source's spread as evenly as whole packs can be.

    Args:
        weights: positive numbers, one a source; their sum is of no account.

    Raises:
        InputError: a weight is not positive, or rounds to no pack of a period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.array(weights, dtype=np.float64)
        if not len(shares) or not np.isfinite(shares).all() or (shares <= 0).any():
            raise InputError(f"The weights of a mixture are {list(weights)}; each must be a number above 0.")
        shares *= PERIOD / shares.sum()
        # Largest remainder: the period is filled exactly, and no share is off by a whole pack.
        self._packs = np.floor(shares).astype(np.int64)
        rest = np.argsort(self._packs - shares, kind="stable")[: PERIOD - self._packs.sum()]
        self._packs[rest] += 1
        if (self._packs == 0).any():
            raise InputError(
                f"The weights of a mixture are {list(weights)}; one is below 1/{2 * PERIOD} of their sum and would never be read."
            )
        # The i-th of n packs of a source is due at (i + 1/2) / n of the period.
        due = np.concatenate([(np.arange(packs) + 0.5) / packs for packs in self._packs])
        self._source = np.repeat(np.arange(len(shares)), self._packs)[np.argsort(due, kind="stable")]
        self._before = np.cumsum(self._source[:, None] == np.arange(len(shares)), axis=0) - (
            self._source[:, None] == np.arange(len(shares))
        )

    @property
    def shares(self) -> np.ndarray:
        """float64 [sources]: the proportions as they are read."""
        return self._packs / PERIOD

    def locate(self, pack: int) -> tuple[int, int]:
        """The source of a pack of the run, and which pack of that source it is."""
        period, place = divmod(pack, PERIOD)
        source = int(self._source[place])
        return source, int(period * self._packs[source] + self._before[place, source])

    def packs_read(self, packs: int) -> np.ndarray:
        """int64 [sources]: how many of the first `packs` packs of the run come from each."""
        periods, place = divmod(packs, PERIOD)
        return periods * self._packs + np.bincount(self._source[:place], minlength=len(self._packs))
