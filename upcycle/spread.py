"""Spreading: a partition of the parents that keeps those that fire together apart.

Two parents of one part compete for the same picks, so a token that wants both loses one. A partition is good when little
affinity (how often two parents fire together) is left inside its parts. Finding the best one is NP-hard (graph partitioning);
greedy starts and pairwise swaps come within a few per cent of it (`tests/upcycle/test_spread.py`).

Everything is whole numbers, so a plan is the same on every machine.

Legend: E parents, P parts, H hidden.
"""

from itertools import cycle

import numpy as np

from moexpand.base.errors import InputError

WHOLE_BITS = 16
"""Router rows are rounded to this many bits below their largest value; sums over H < 2^19 of products then stay below 2^53, where
float64 adds whole numbers exactly in any order."""
STARTS = 8
"""Greedy starts of `partition`; each begins at another parent."""
REPEATED = 4
"""A pair that was together before costs this much more, each time. Between 1 and 8 the prediction hardly changes; at 0 the
partitions come out too much alike."""
AFFINITY_BITS = 20
"""A cosine of 1 is this power of two."""
LARGEST_BITS = 36
"""Affinities are shifted down to this many bits, so that no sum of theirs overflows int64."""


def partition(affinity: np.ndarray, parts: int, together: np.ndarray | None = None) -> np.ndarray:
    """Cut the parents into parts of equal size with little affinity inside.

    Greedy start: parents by their total affinity, the largest first, each to the part with the least affinity to it. Then swaps
    of two parents until none improves. The best of a few starts wins. Ties go to the lowest index, so the result is
    deterministic.

    Args:
        affinity: [E, E] whole numbers >= 0, symmetric; the diagonal does not matter. Any scale.
        parts: P, a divisor of E.
        together: [E, E], how many earlier partitions have each pair in one part. The affinity of such a pair weighs
            1 + 4 * `together` times, and a little even if it is 0, so that partitions differ where affinity says nothing.

    Returns:
        int64 [E], the part of every parent, 0 ... P - 1.
    """
    cost = _pair_costs(affinity, together)
    starts = sorted({start * len(cost) // STARTS for start in range(STARTS)})
    return min((_swapped(cost, _greedy(cost, parts, start), parts) for start in starts), key=lambda part: inside(cost, part))


def inside(affinity: np.ndarray, part: np.ndarray) -> int:
    """Affinity of the pairs that a partition leaves together: what `partition` minimises."""
    same = part[:, None] == part
    return int(np.triu(affinity * same, 1).sum())


def router_affinity(rows: np.ndarray) -> np.ndarray:
    """Affinity from router rows alone: the positive part of the cosine of the centred rows.

    Parents whose rows point the same way rank high for the same hidden states. The mean row moves all logits alike and is taken
    off first.

    Args:
        rows: [E, H], any float dtype.

    Returns:
        int64 [E, E], 2^20 for a cosine of 1. Every sum is exact, so the last bits of a BLAS cannot change a plan.

    Raises:
        InputError: a value is not finite.
    """
    rows = np.asarray(rows, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise InputError("Rows of the parent's router hold values that are not finite; the parent is damaged.")
    _, exponent = np.frexp(np.abs(rows).max())
    whole = np.rint(np.ldexp(rows, WHOLE_BITS - exponent))
    centred = np.rint(whole - whole.sum(0) / len(rows))
    products = centred @ centred.T
    norms = np.sqrt(np.diag(products))
    cosine = np.divide(products, np.outer(norms, norms), out=np.zeros_like(products), where=products > 0)
    return np.rint(np.ldexp(cosine, AFFINITY_BITS)).astype(np.int64)


def _pair_costs(affinity: np.ndarray, together: np.ndarray | None) -> np.ndarray:
    """Cost of having a pair in one part, int64 [E, E] with a diagonal of 0."""
    cost = np.array(affinity, dtype=np.int64)
    cost >>= max(0, int(cost.max()).bit_length() - LARGEST_BITS)
    if together is not None:
        cost += (REPEATED * cost + 1) * together
    np.fill_diagonal(cost, 0)
    return cost


def _greedy(cost: np.ndarray, parts: int, start: int) -> np.ndarray:
    """Parents by their total cost, the largest first and from place `start` on, each to the part that it costs least."""
    free = np.full(parts, len(cost) // parts)
    part = np.full(len(cost), -1)
    towards_PE = np.zeros((parts, len(cost)), dtype=np.int64)
    for parent in np.roll(np.argsort(-cost.sum(1), kind="stable"), -start):
        open_parts = np.flatnonzero(free)
        chosen = open_parts[towards_PE[open_parts, parent].argmin()]
        part[parent] = chosen
        free[chosen] -= 1
        towards_PE[chosen] += cost[parent]
    return part


def _swapped(cost: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """Improve `part` by swaps of two parents, for each parent in turn its best one, until no swap lowers the cost.

    With T_p,i the cost of parent i towards part p, swapping i and j of parts a and b changes the cost by
    (T_b,i - T_a,i) + (T_a,j - T_b,j) - 2 cost_ij; it is 0 for two parents of one part.
    """
    part = part.copy()
    every = np.arange(len(part))
    towards_PE = (part == np.arange(parts)[:, None]).astype(np.int64) @ cost
    since_swap = 0
    for i in cycle(every):
        own_E = towards_PE[part, every]
        change_E = towards_PE[part, i] - own_E[i] + towards_PE[part[i]] - own_E - 2 * cost[i] * (part != part[i])
        j = change_E.argmin()
        since_swap += 1
        if change_E[j] < 0:
            towards_PE[part[i]] += cost[j] - cost[i]
            towards_PE[part[j]] += cost[i] - cost[j]
            part[[i, j]] = part[[j, i]]
            since_swap = 0
        elif since_swap >= len(part):
            break
    return part
