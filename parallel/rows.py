"""Rows of tokens sorted by expert, and the products of each expert's rows with its weights.

Legend: U tokens, C experts that a token visits here, E local experts, R rows: the U x C visits sorted by expert, with padding
between them where experts are multiplied in blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

CALL = 1_000_000
"""Multiply-adds that cost a CPU as much as one more call of its BLAS: some 10 to 20 microseconds, at the speed of two cores."""

_BLOCK_SIZES = (512, 128, 32, 16, 8, 4)


@dataclass(frozen=True)
class Rows:
    """Where the rows of each expert lie, and which token each row copies.

    On a CPU, where torch's grouped product calls the BLAS for one expert after the other, neighbouring experts may be filled up
    to the same number of rows and multiplied as one batch, a block.

    Attributes:
        counts: int64 [E], rows of each expert, padding not counted.
        capacities: where set, the rows that each expert of a block has, a number for each block. Those beyond an expert's count
            are padding: copies of some token with the weight 0.
        token_of_row: int64 [R], or None where the input is the rows themselves.
        row_of_visit: int64 [U, C], the row of every visit of a token; None likewise.
    """

    counts: torch.Tensor
    capacities: list[int] | None = None
    token_of_row: torch.Tensor | None = None
    row_of_visit: torch.Tensor | None = None

    @classmethod
    def sort(cls, local_UC: torch.Tensor, experts: int, weights_per_row: int) -> "Rows":
        """The rows of a choice of local experts, int64 [U, C] with values 0 ... experts - 1.

        Args:
            weights_per_row: size of the smaller weight of an expert; decides how large blocks are.
        """
        # Narrow numbers sort several times faster.
        keys = local_UC.flatten().to(torch.int16 if experts <= 2**15 - 1 else torch.int32)
        visits = torch.argsort(keys, stable=True)
        counts_E = torch.bincount(local_UC.flatten(), minlength=experts)
        return cls._placed(visits, local_UC.shape, counts_E, _capacities(counts_E, weights_per_row))

    @classmethod
    def given(cls, rows_per_expert: torch.Tensor, device: torch.device, weights_per_row: int) -> "Rows":
        """Rows that a dispatcher has sorted already; int [E]."""
        counts_E = rows_per_expert.to(device, torch.int64)
        capacities = _capacities(counts_E, weights_per_row)
        if capacities is None:
            return cls(counts_E)
        # Each row is a token of its own with one visit.
        visits = torch.arange(int(counts_E.sum()))
        return cls._placed(visits, torch.Size((len(visits), 1)), counts_E, capacities)

    @classmethod
    def _placed(cls, visits: torch.Tensor, shape: torch.Size, counts_E: torch.Tensor, capacities: list[int] | None) -> "Rows":
        """The rows of visits that are sorted by expert, numbers in a choice of shape [U, C]."""
        token_of_row, rows = visits // shape[1], torch.arange(len(visits), device=visits.device)
        if capacities is not None:
            reserved_E = torch.tensor(capacities).repeat_interleave(len(counts_E) // len(capacities))
            moved_E = (reserved_E.cumsum(0) - reserved_E) - (counts_E.cumsum(0) - counts_E)
            rows = rows + moved_E.repeat_interleave(counts_E)
            token_of_row = torch.zeros(int(reserved_E.sum()), dtype=torch.int64).scatter_(0, rows, token_of_row)
        row_of_visit = torch.empty_like(visits).scatter_(0, visits, rows)
        return cls(counts_E, capacities, token_of_row, row_of_visit.view(shape))

    @cached_property
    def ends(self) -> torch.Tensor:
        """Where each expert's rows end, int32 [E], without padding."""
        return self.counts.cumsum(0).to(torch.int32)

    def real(self, rows: int) -> torch.Tensor:
        """Which of R rows are no padding, sorted, int64."""
        if self.capacities is None or self.row_of_visit is None:
            return torch.arange(rows, device=self.counts.device)
        return self.row_of_visit.flatten().sort().values

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """The weight of every row [R], from those of the visits [U, C]; 0 for padding."""
        if self.row_of_visit is None or self.token_of_row is None:
            return weights
        return weights.new_zeros(len(self.token_of_row)).scatter_(0, self.row_of_visit.flatten(), weights.flatten())

    def times(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Each expert's rows [R, X] by its weights [E, X, Y]: [R, Y]."""
        if self.capacities is not None:
            product = left.new_empty(len(left), right.shape[2])
            for experts, rows, block in self._blocks(self.capacities):
                torch.bmm(left[rows].view(*block, left.shape[1]), right[experts], out=product[rows].view(*block, right.shape[2]))
            return product
        if left.dtype == torch.float64:
            return torch.cat([left[span] @ weight for span, weight in zip(self._spans(), right, strict=True)])
        return torch.nn.functional.grouped_mm(left, right, offs=self.ends)

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Sums over each expert's rows of the products of [R, X] and [R, Y]: [E, X, Y]; zeros for an expert without rows."""
        if self.capacities is not None:
            product = left.new_empty(len(self.counts), left.shape[1], right.shape[1])
            for experts, rows, block in self._blocks(self.capacities):
                left_block = left[rows].view(*block, left.shape[1])
                torch.bmm(left_block.transpose(1, 2), right[rows].view(*block, right.shape[1]), out=product[experts])
            return product
        if left.dtype == torch.float64:
            return torch.stack([left[span].t() @ right[span] for span in self._spans()])
        return torch.nn.functional.grouped_mm(left.t(), right, offs=self.ends)

    def _blocks(self, capacities: list[int]) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        """The experts of every block, its rows, and both sizes."""
        size, row = len(self.counts) // len(capacities), 0
        for number, capacity in enumerate(capacities):
            yield slice(number * size, (number + 1) * size), slice(row, row + size * capacity), (size, capacity)
            row += size * capacity

    def _spans(self) -> list[slice]:
        """For float64, which tests alone use and torch's grouped product lacks."""
        return [slice(start, stop) for start, stop in pairwise([0, *self.ends.tolist()])]


def _capacities(counts_E: torch.Tensor, weights_per_row: int) -> list[int] | None:
    """Rows to reserve for every expert of each block, or None where a call for every expert is cheaper."""
    if counts_E.device.type != "cpu":  # a GPU multiplies all experts at once anyway
        return None
    least, best = int(counts_E.sum()) * weights_per_row + len(counts_E) * CALL, None
    for size in (len(counts_E), *_BLOCK_SIZES):
        if len(counts_E) % size == 0:
            capacities = counts_E.view(-1, size).amax(1)
            cost = int(capacities.sum()) * size * weights_per_row + len(capacities) * CALL
            if cost < least:
                least, best = cost, capacities.tolist()
    return best
