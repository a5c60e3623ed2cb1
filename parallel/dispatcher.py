"""`grouped_allgather`: dispatch for grouped routing whose sizes are known before the router has spoken.

Every token visits K/G experts in each group, so a rank that owns whole groups computes exactly U x K / EP rows, whatever the
data: tokens and routing are all-gathered, every rank takes its groups' columns, outputs are reduce-scattered. No sizes are
exchanged, and none of the dispatcher's buffers depends on the routing. (Those of the experts do on a CPU, which pads neighbouring
experts to the same number of rows: see rows.py.) The gather of the weights is differentiable: the router gets its gradient from
the experts of all ranks.

Legend: T tokens of this rank, U tokens of all ranks of the ETP x EP group, K chosen, C = K / EP columns of this rank, H hidden.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region


class GroupedAllGather:
    """Brings tokens to the ranks that own their experts, and the sums back."""

    def __init__(self, num_experts: int, top_k: int, pg_collection: Any) -> None:
        self.ep_size, self.ep_rank = pg_collection.ep.size(), pg_collection.ep.rank()
        self.group = pg_collection.tp_ep
        self.experts = num_experts // self.ep_size
        self.first_expert = self.ep_rank * self.experts
        self.columns = top_k // self.ep_size
        self.rows = 0
        """Rows that the last forward pass computed here."""

    def gather(
        self, tokens_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [U, H], this rank's local experts int64 [U, C] and their weights [U, C].

        Args:
            chosen_TK: columns in order of the groups.
        """
        if self.group.size() > 1:
            tokens_TH = gather_from_sequence_parallel_region(tokens_TH, group=self.group)
            chosen_TK = gather_from_sequence_parallel_region(chosen_TK, group=self.group)
            weights_TK = gather_from_sequence_parallel_region(weights_TK, group=self.group)
        own = slice(self.ep_rank * self.columns, (self.ep_rank + 1) * self.columns)
        local_UC = chosen_TK[:, own] - self.first_expert
        self.rows = local_UC.numel()
        # Every column belongs to an expert of this rank, on every rank: so these tokens x K / EP rows are all that it computes.
        # On a GPU the device finds out by itself, and the host does not wait.
        own_groups = ((local_UC >= 0) & (local_UC < self.experts)).all()
        torch._assert_async(own_groups, "the chosen experts' columns are not in order of the groups")
        return tokens_TH, local_UC, weights_TK[:, own]

    def scatter(self, outputs_UH: torch.Tensor) -> torch.Tensor:
        """Add up over the ranks and keep this rank's tokens: [U, H] -> [T, H]."""
        if self.group.size() == 1:
            return outputs_UH
        return reduce_scatter_to_sequence_parallel_region(outputs_UH, group=self.group)
