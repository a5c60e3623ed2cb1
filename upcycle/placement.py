"""Placements: which parent expert each slot of a child copies.

Slots are contiguous in groups: group g of G holds slots g*M ... (g + 1)*M - 1, M = slots / G. Each placement cuts the E
parents into halves; a group holds one half, every parent of it c = 2 r / G times, r = slots / E.
"""

from collections.abc import Callable

import numpy as np

from moexpand.base.errors import InputError

PARTS = 2


def slot_map(placement: str, parents: int, slots: int, groups: int) -> np.ndarray:
    """Parent of every slot, int64 [slots]; each parent is copied slots / parents times.

    * `halves_tile`: groups hold the lower and the upper half of the parents in turn. With c = 1 slot j copies parent
      j mod E, and the child at step 0 is the parent's softmax over the best expert of each half.
    * `halves_bits`: group 2i holds the parents whose bit i is 0, group 2i + 1 those whose bit i is 1. The best parent is
      picked once a pair; the other group of a pair picks the best on the other side of its bit.

    Raises:
        InputError: the sizes do not fit the placement; the message names group counts that do.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"Placement {placement!r} is unknown; known are {', '.join(PLACEMENTS)}.")
    if parents < PARTS or slots <= parents or slots % parents:
        raise InputError(
            f"{slots} experts are not a multiple (2 or more times) of the parent's {parents}; choose num_experts accordingly."
        )
    copies = slots // parents
    if parents % PARTS or not _fits(parents, slots, groups):
        fitting = [str(count) for count in range(2, PARTS * copies + 1) if _fits(parents, slots, count)]
        hint = f"num_groups may be {', '.join(fitting)}" if fitting and parents % PARTS == 0 else "no number of groups fits"
        raise InputError(
            f"Placement {placement} cuts {parents} experts into halves and puts {PARTS}*{copies}/{groups} copies of a half into "
            f"each of {groups} groups, which must be a whole number for an even number of groups: {hint}."
        )
    rows = PLACEMENTS[placement](parents, groups)
    return np.tile(rows, (1, PARTS * copies // groups)).reshape(slots)


def _fits(parents: int, slots: int, groups: int) -> bool:
    return groups > 0 and groups % PARTS == 0 and PARTS * slots // parents % groups == 0


def _halves_tile(parents: int, groups: int) -> np.ndarray:
    """Parents of each group, [G, E / 2]."""
    return np.tile(np.arange(parents).reshape(PARTS, -1), (groups // PARTS, 1))


def _halves_bits(parents: int, groups: int) -> np.ndarray:
    """Parents of each group, [G, E / 2]."""
    pairs = groups // PARTS
    if parents % (1 << pairs):
        raise InputError(
            f"Placement halves_bits needs a bit of the parent's index for each of {pairs} pairs of groups, and {parents} experts "
            f"are not a multiple of 2^{pairs} = {1 << pairs}; choose halves_tile or fewer groups."
        )
    index = np.arange(parents)
    return np.stack([index[(index >> bit) & 1 == side] for bit in range(pairs) for side in (0, 1)])


PLACEMENTS: dict[str, Callable[[int, int], np.ndarray]] = {"halves_bits": _halves_bits, "halves_tile": _halves_tile}
