"""The router gradient `default_vector`: experts that a token did not visit stand in with a moving average of their outputs.

The formula is that of `moexpand.base.routing.unpicked_shares`. A step costs one product of the size of the router's own in the
backward pass, and one [E, H] table a layer over the ranks at its end.

Legend: T tokens of this rank, E experts, e of them on this rank, H hidden.
"""

from typing import Any

import torch
import torch.distributed as dist

from moexpand.parallel.experts import GroupedExperts


class _Represent(torch.autograd.Function):
    """Returns `output_TH` as it is; in the backward pass the shares get dL/dq_j = <dL/dy, m_j>."""

    @staticmethod
    def forward(ctx: Any, output_TH: torch.Tensor, shares_TE: torch.Tensor, vectors_EH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(vectors_EH)
        ctx.shares_dtype = shares_TE.dtype
        return output_TH.view_as(output_TH)

    @staticmethod
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (vectors_EH,) = ctx.saved_tensors
        return gradient_TH, (gradient_TH.to(vectors_EH.dtype) @ vectors_EH.t()).to(ctx.shares_dtype), None


class DefaultVectors(torch.nn.Module):
    """Moving averages of all experts' outputs of one layer, the same on every rank.

    `total` holds decay^k-weighted sums of the means of the steps in which the expert had tokens, `weight` the sum of the weights,
    so that total / weight is free of the bias towards zero; both are saved with the run.
    """

    def __init__(self, num_experts: int, hidden_size: int, decay: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.decay = decay
        self.total: torch.Tensor
        self.weight: torch.Tensor
        self.register_buffer("total", torch.zeros(num_experts, hidden_size, dtype=dtype))
        self.register_buffer("weight", torch.zeros(num_experts, dtype=dtype))

    @property
    def vectors(self) -> torch.Tensor:
        """m, [E, H]; zero for experts that have had no token yet."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)[:, None]

    def represent(self, output_TH: torch.Tensor, shares_TE: torch.Tensor) -> torch.Tensor:
        """Hang the gradient of the shares on a layer's output."""
        return _Represent.apply(output_TH, shares_TE, self.vectors)

    def update(
        self, sums_eH: torch.Tensor, rows_e: torch.Tensor, experts: GroupedExperts, groups: tuple[dist.ProcessGroup, ...]
    ) -> None:
        """Take a step's outputs into the averages.

        Args:
            sums_eH, rows_e: of this rank's experts, by `GroupedExperts.take_output_sums`.
            experts: this rank's; all together hold every expert.
            groups: over which sums add up to the step's.
        """
        local, rank = experts.num_local_experts, experts.ep_group.rank()
        table = torch.zeros(len(self.weight), self.total.shape[1] + 1, dtype=self.total.dtype, device=self.total.device)
        own = table[rank * local : (rank + 1) * local]
        own[:, :-1] = sums_eH
        # Ranks of an expert-tensor group hold shares of the same rows' outputs.
        own[:, -1] = rows_e / experts.tensor_group.size()
        for group in groups:
            dist.all_reduce(table, group=group)
        seen = table[:, -1] > 0
        mean_EH = table[:, :-1] / table[:, -1:].clamp(min=1)
        self.total[seen] = self.decay * self.total[seen] + (1 - self.decay) * mean_EH[seen]
        self.weight[seen] = self.decay * self.weight[seen] + (1 - self.decay)
