"""The local experts of a rank as two stacked weights.

Legend: E local experts, R rows (token copies, sorted by expert), U tokens, C experts that a token visits here, H hidden,
I intermediate of this rank (its part of it, under expert tensor parallelism).
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moexpand.parallel.expert_mlp import InnerSums, expert_mlp
from moexpand.parallel.rows import Rows


class GroupedExperts(MegatronModule):
    """SwiGLU experts: down(silu(gate x) * up x), times the router's weight.

    `gate_up` [E, 2, I, H] holds gate and up; `down` [E, H, I]. Expert tensor parallelism splits I, so that each rank's outputs
    are its share of a sum.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tensor_group = pg_collection.ep, pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        hidden, inner = config.hidden_size, config.moe_ffn_hidden_size // self.tensor_group.size()
        self.gate_up = torch.nn.Parameter(torch.empty(num_local_experts, 2, inner, hidden, dtype=config.params_dtype))
        self.down = torch.nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=config.params_dtype))
        for parameter in (self.gate_up, self.down):
            # Always reduced over the expert-data-parallel group, also where every rank holds all experts: Megatron-Core's
            # own rule (dense group when EP is 1) forgets the tensor-parallel ranks, which see different tokens.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Not the same on all tensor-parallel ranks, so that each rank's share counts in the gradient norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.average_outputs = False
        self.inner_sums: InnerSums | None = None
        self.rows_computed = 0

    def rows_of(self, local_UC: torch.Tensor) -> Rows:
        """The rows of a choice among the local experts, int64 [U, C]."""
        return Rows.sort(local_UC, self.num_local_experts, self.down[0].numel())

    def rows_given(self, rows_per_expert: torch.Tensor) -> Rows:
        """Rows that lie in order already, int [E]."""
        return Rows.given(rows_per_expert, self.down.device, self.down[0].numel())

    def forward(self, x: torch.Tensor, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Run tokens through the experts that they visit.

        Args:
            x: tokens [U, H], or [R, H] where the rows are given sorted.
            weights: [U, C] or [R].

        Returns:
            The weighted sums [U, H], or weighted rows [R, H].
        """
        if torch.is_grad_enabled():
            self.rows_computed += weights.numel()
        collecting = self.average_outputs and self.training and torch.is_grad_enabled()
        if collecting and self.inner_sums is None:
            self.inner_sums = InnerSums(self.down)
        return expert_mlp(x, weights, self.gate_up.flatten(1, 2), self.down, rows, self.inner_sums if collecting else None)

    def take_output_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of each local expert's outputs since the last call, unweighted, fp32 or wider [E, H], and their number int64 [E].

        To be called while the weights are those of the forward passes: what is kept of them lies before the down projection.
        Under expert tensor parallelism the sums are this rank's share.
        """
        taken, self.inner_sums = self.inner_sums or InnerSums(self.down), None
        sums_EH = torch.bmm(self.down.detach().to(taken.sums.dtype), taken.sums[:, :, None])[:, :, 0]
        return sums_EH, taken.rows

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Where this rank's experts lie among all: Megatron-Core's checkpoints load them at any expert-parallel size."""
        axis = len(sharded_offsets)
        return {
            prefix + name: ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                (axis, self.ep_group.rank(), self.ep_group.size()),
                (axis + 2, self.tensor_group.rank(), self.tensor_group.size()),
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in (("gate_up", self.gate_up), ("down", self.down))
        }

    def backward_dw(self) -> None:
        """Part of Megatron-Core's protocol; the weight gradients are computed in the backward pass itself."""
