"""`grouped_allgather`: dispatch for grouped routing whose sizes are known before the router has spoken.

Every token visits K/G experts in each group, so a rank that owns whole groups computes exactly T x K / EP rows, whatever the
data: all tokens are gathered, each rank's columns of the routing are exchanged in equal pieces, outputs are reduce-scattered.
No sizes are exchanged, and no buffer depends on the routing. With one expert-parallel rank it is the plain local path.

Legend: T tokens of this rank, U = T x EP gathered tokens, K chosen, R = U x K / EP rows of this rank, H hidden.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig


class GroupedAllGatherDispatcher(MoETokenDispatcher):
    """Takes the compact routing of `GroupedRouter`: weights [T, K] and chosen experts [T, K], columns in order of the groups."""

    def __init__(
        self, num_local_experts: int, local_expert_indices: list[int], config: TransformerConfig, pg_collection: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.first_local_expert = local_expert_indices[0]

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the choice and flatten [T, 1, H] to [T, H]."""
        self.hidden_shape = tokens.shape
        self.chosen_TK = routing_map
        return tokens.flatten(0, -2), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather tokens [U, H] and this rank's columns of weights and choice, both [U, K / EP]."""
        if self.ep_size == 1:
            self.chosen_UC = self.chosen_TK
            return hidden_states, probs
        gathered_UH = gather_from_sequence_parallel_region(hidden_states, group=self.ep_group)
        self.chosen_UC = self._own_columns(self.chosen_TK)
        return gathered_UH, self._own_columns(probs)

    def _own_columns(self, per_token_TK: torch.Tensor) -> torch.Tensor:
        """Send every rank the columns of its groups; equal pieces, and the gradient travels back."""
        columns = per_token_TK.shape[1] // self.ep_size
        by_rank = per_token_TK.unflatten(1, (self.ep_size, columns)).transpose(0, 1).contiguous()
        return all_to_all(self.ep_group, by_rank.flatten(0, 1))

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [R, H] sorted by local expert, rows per expert [E], weights [R]."""
        local_R = (self.chosen_UC - self.first_local_expert).flatten()
        order_R = torch.argsort(local_R, stable=True)
        self.token_of_row_R = order_R // self.chosen_UC.shape[1]
        self.gathered_shape = hidden_states.shape
        rows_per_expert = torch.bincount(local_R, minlength=self.num_local_experts)
        return hidden_states.index_select(0, self.token_of_row_R), rows_per_expert, probs.flatten().index_select(0, order_R)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Add up each gathered token's rows: [R, H] -> [U, H]."""
        summed_UH = hidden_states.new_zeros(self.gathered_shape)
        return summed_UH.index_add(0, self.token_of_row_R, hidden_states)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Add up over the ranks and keep this rank's tokens: [U, H] -> [T, H]."""
        return (
            hidden_states if self.ep_size == 1 else reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.ep_group)
        )

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Back to [T, 1, H]."""
        return hidden_states.view(self.hidden_shape)
