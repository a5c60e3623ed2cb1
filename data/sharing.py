"""Which data-parallel rank computes which micro-batch: as many for each, and as level as possible in what encoders have to do."""

import heapq

import numpy as np

SWAPS = 64
"""Attempts to level the fullest and the emptiest rank; a handful is usual."""


def share(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Deal micro-batches out to ranks.

    The costliest first, each to the rank with the least so far that may take one more (Graham's LPT rule under equal numbers),
    then swaps between the fullest rank and others for as long as they lower its load. Without costs, in turn.

    Args:
        costs: int64 [M], tokens of images and series of every micro-batch; `ranks` divides M.
        ranks: data-parallel ranks.

    Returns:
        int64 [M / ranks, ranks]: micro-batches of each rank, ascending.
    """
    count = len(costs) // ranks
    if ranks == 1 or not costs.any():
        return np.arange(len(costs)).reshape(count, ranks)
    waiting = [(0, rank) for rank in range(ranks)]
    given: list[list[int]] = [[] for _ in range(ranks)]
    for number in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(waiting)
        given[rank].append(number)
        if len(given[rank]) < count:
            heapq.heappush(waiting, (load + int(costs[number]), rank))
    dealt = np.array(given)
    for _ in range(SWAPS):
        if not _swap(dealt, costs):
            break
    return np.sort(dealt, axis=1).T


def _swap(dealt: np.ndarray, costs: np.ndarray) -> bool:
    """Exchange one micro-batch of the fullest rank for one of another [R, M / R], so that the fuller of the two is least full."""
    loads = costs[dealt].sum(axis=1)
    fullest = int(loads.argmax())
    best: tuple[int, int, int, int] | None = None
    for other in np.argsort(loads, kind="stable")[: max(1, len(loads) // 2)].tolist():
        if other == fullest:
            continue
        moved = costs[dealt[fullest]][:, None] - costs[dealt[other]][None, :]
        after = np.maximum(loads[fullest] - moved, loads[other] + moved)
        place = int(after.argmin())
        if after.flat[place] < loads[fullest] and (best is None or after.flat[place] < best[0]):
            best = (int(after.flat[place]), other, *divmod(place, moved.shape[1]))
    if best is None:
        return False
    _, other, mine, theirs = best
    dealt[fullest, mine], dealt[other, theirs] = dealt[other, theirs], dealt[fullest, mine]
    return True
