"""The local experts of a rank as two stacked weights, computed by grouped matrix products.

Legend: E local experts, R rows (token copies, sorted by expert), H hidden, I intermediate.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


def grouped_linear(rows_RX: torch.Tensor, weights_EYX: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its own weight, transposed: [R, X], [E, Y, X] -> [R, Y].

    Args:
        rows_per_expert: int64 [E], sums to R.
    """
    if rows_RX.dtype == torch.float64:  # torch's grouped product has no float64
        parts = rows_RX.split(rows_per_expert.tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights_EYX, strict=True)])
    ends = rows_per_expert.to(rows_RX.device).cumsum(0).to(torch.int32)
    return torch.nn.functional.grouped_mm(rows_RX, weights_EYX.transpose(-2, -1), offs=ends)


class GroupedExperts(MegatronModule):
    """SwiGLU experts: down(silu(gate x) * up x), times the router's weight.

    `gate_up` [E, 2I, H] holds the gate rows first, then the up rows; `down` [E, H, I].
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.expert_dp_group = pg_collection.expt_dp
        hidden, intermediate = config.hidden_size, config.moe_ffn_hidden_size
        self.gate_up = torch.nn.Parameter(torch.empty(num_local_experts, 2 * intermediate, hidden, dtype=config.params_dtype))
        self.down = torch.nn.Parameter(torch.empty(num_local_experts, hidden, intermediate, dtype=config.params_dtype))
        for parameter in (self.gate_up, self.down):
            # Always reduced over the expert-data-parallel group, also where every rank holds all experts: Megatron-Core's
            # own rule (dense group when EP is 1) forgets the tensor-parallel ranks, which see different tokens.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Not the same on all tensor-parallel ranks, so that each rank's share counts in the gradient norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, rows_RH: torch.Tensor, rows_per_expert: torch.Tensor, weights_R: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Compute [R, H] rows, sorted by local expert; returns [R, H] and no bias."""
        gate_RI, up_RI = grouped_linear(rows_RH, self.gate_up, rows_per_expert).chunk(2, dim=-1)
        inner_RI = torch.nn.functional.silu(gate_RI) * up_RI * weights_R.to(rows_RH.dtype)[:, None]
        return grouped_linear(inner_RI, self.down, rows_per_expert), None

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
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in (("gate_up", self.gate_up), ("down", self.down))
        }

    def backward_dw(self) -> None:
        """Part of Megatron-Core's protocol; the weight gradients are computed in the backward pass itself."""
