"""Unequal numbers of copies: more slots for the parents that are used more, and how they are dealt to the groups."""

from fractions import Fraction

import numpy as np


def copy_counts(popularity: np.ndarray, slots: int, groups: int) -> np.ndarray:
    """How many slots each parent gets: in proportion to its popularity, at least 1, at most one a group.

    Largest remainder: every parent gets the whole part of its share, the rest goes one by one to the largest fractions, ties to
    the lowest index. Parents whose share is outside the bounds get the bound, and the others share what is left. Exact rational
    arithmetic, so a plan is the same on every machine.

    Args:
        popularity: [E], finite and >= 0, any scale.
        slots: sum of the counts, between E and E * groups.
        groups: G.

    Returns:
        int64 [E].
    """
    weights = [Fraction(float(value)) for value in popularity]
    counts = np.zeros(len(weights), dtype=np.int64)
    open_parents, left = list(range(len(weights))), slots
    while open_parents:
        total = sum(weights[parent] for parent in open_parents)
        shares = {
            parent: left * weights[parent] / total if total else Fraction(left, len(open_parents)) for parent in open_parents
        }
        high = [parent for parent in open_parents if shares[parent] > groups]
        low = [parent for parent in open_parents if shares[parent] < 1]
        if not high and not low:
            _largest_remainder(counts, shares, left)
            break
        # Bind the side that is off by more: binding both at once could bind parents whose share comes back into range.
        too_much = sum(shares[parent] - groups for parent in high)
        too_little = sum(1 - shares[parent] for parent in low)
        bound, value = (high, groups) if too_much >= too_little else (low, 1)
        counts[bound] = value
        left -= value * len(bound)
        open_parents = [parent for parent in open_parents if counts[parent] == 0]
    return counts


def deal(counts: np.ndarray, groups: int, affinity: np.ndarray | None = None) -> np.ndarray:
    """Deal the copies of all parents to groups of equal size, at most one copy of a parent to a group.

    Parents by their number of copies, the largest first; each copy goes to a group with the most free slots, and among those to
    the one whose members have the least affinity to the parent, then to the lowest. The groups' free slots never differ by more
    than one, so this always comes out (Gale and Ryser, 1957).

    Args:
        counts: [E], 1 ... G, with a sum that is a multiple of G.
        groups: G.
        affinity: [E, E], how often two parents fire together.

    Returns:
        int64 [G, sum / G], the parents of every group, ascending.
    """
    parents = len(counts)
    held = np.zeros((groups, parents), dtype=bool)
    free = np.full(groups, int(counts.sum()) // groups)
    towards = np.zeros((groups, parents), dtype=np.int64)  # affinity of each group's members to each parent
    for parent in np.argsort(-counts, kind="stable"):
        chosen = np.lexsort((towards[:, parent], -free))[: counts[parent]]
        held[chosen, parent] = True
        free[chosen] -= 1
        if affinity is not None:
            towards[chosen] += affinity[parent]
    return np.stack([np.flatnonzero(row) for row in held])


def _largest_remainder(counts: np.ndarray, shares: dict[int, Fraction], left: int) -> None:
    for parent, share in shares.items():
        counts[parent] = share // 1
        left -= share // 1
    by_fraction = sorted(shares, key=lambda parent: (-(shares[parent] % 1), parent))
    counts[by_fraction[:left]] += 1
