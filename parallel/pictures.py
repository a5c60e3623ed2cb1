"""Pictures of a micro-batch: their patches, which token holds which feature, and positions on three axes.

A picture comes as patches in blocks of merge x merge, which become one feature each, and stands in the stream as that many
placeholder tokens in the same order.

Legend: T tokens of the whole stream, P patches, C colours, S side of a patch in pixels, F frames of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Grid = tuple[int, int, int]
"""Patches of a picture: frames, rows, columns."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of a micro-batch in the order of their tokens.

    Attributes:
        patches: uint8 [P, C * S * S], in main memory: each rank takes what it computes to its device.
        grids: of each picture; their products add up to P.
        table: float32 [C, 256], on the device: the normalised value of each byte of each colour.
    """

    patches: torch.Tensor
    grids: list[Grid]
    table: torch.Tensor

    def pixels(self, numbers: Sequence[int], frames: int) -> torch.Tensor:
        """Normalised patches of some pictures, float32 [P', C * F * S * S]; a picture repeats its one frame."""
        ends = np.cumsum([0] + [int(np.prod(grid)) for grid in self.grids])
        rows = torch.cat([self.patches[ends[number] : ends[number + 1]] for number in numbers]).to(self.table.device)
        colours = self.table.shape[0]
        looked_up = [self.table[colour][each.int()] for colour, each in enumerate(rows.view(len(rows), colours, -1).unbind(1))]
        return torch.stack(looked_up, 1)[:, :, None].expand(-1, -1, frames, -1).flatten(1)


def features_of(grid: Grid, merge: int) -> int:
    """Features, and so placeholder tokens, of a picture."""
    return grid[0] * grid[1] * grid[2] // merge**2


def feature_at(tokens: np.ndarray, placeholder: int) -> np.ndarray:
    """int64 [T], number of the feature that stands at each token, -1 at all others."""
    found = tokens == placeholder
    return np.where(found, np.cumsum(found) - 1, -1)


def axes(tokens: np.ndarray, cu_seqlens: np.ndarray, grids: Sequence[Grid], placeholder: int, merge: int) -> np.ndarray:
    """Positions on the axes time, height and width, as Qwen3-VL counts them.

    Text moves all three on by one. The features of a picture share the position p of its beginning and add their own frame, row
    and column; behind it, text goes on at p plus the larger side of the picture.

    Args:
        tokens: int64 [T].
        cu_seqlens: int [segments + 1], where each segment begins; positions begin at 0 in each.
        grids: of the pictures, none of which goes over the end of a segment.
        placeholder: holds a feature's place; where there is no picture, a token like others.

    Returns:
        int64 [3, T].
    """
    places = np.flatnonzero((tokens == placeholder) & bool(grids))
    step = np.ones(len(tokens), dtype=np.int64)
    step[places] = 0
    inside = np.zeros((3, len(tokens)), dtype=np.int64)
    end = 0
    for frames, rows, columns in grids:
        own = places[end : end + features_of((frames, rows, columns), merge)]
        inside[:, own] = np.indices((frames, rows // merge, columns // merge)).reshape(3, -1)
        step[own[-1]] = max(rows, columns) // merge
        end += len(own)
    before = np.cumsum(step) - step
    starts, lengths = cu_seqlens[:-1], np.diff(cu_seqlens)
    starts = starts[lengths > 0]
    return before - np.repeat(before[starts], lengths[lengths > 0]) + inside


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Which pictures each rank computes, in increasing order: the most costly go first, to the rank with the least so far."""
    load: list[int] = [0] * ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = load.index(min(load))
        load[rank] += costs[number]
        hands[rank].append(number)
    return [sorted(hand) for hand in hands]
