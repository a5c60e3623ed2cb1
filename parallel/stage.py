"""A pipeline stage: Megatron-Core's GPTModel whose last part turns hidden states into a loss without keeping logits."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region

from moexpand.parallel.head import head_loss


class Head(ColumnParallelLinear):
    """The output layer, which with labels returns the sum of the losses of unmasked tokens."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> Any:
        """Hidden states [T, 1, H] of this rank (a part under sequence parallelism), the tied weight, labels and mask [1, T]."""
        if labels is None or loss_mask is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.config.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        return head_loss(input_.flatten(0, 1), weight, labels.flatten(), loss_mask.flatten(), self.tp_group)


class Stage(GPTModel):
    """With labels it returns the sum of the losses of unmasked tokens, without them the logits (both on the last stage)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.post_process:
            # Megatron-Core builds this layer itself and can be told no other; ours has the same state.
            self.output_layer.__class__ = Head

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        if not self.post_process or labels is None or loss_mask is None:
            logits: torch.Tensor = super()._postprocess(hidden_states, *args, labels=None, loss_mask=None, **others)
            return logits
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=tied, labels=labels, loss_mask=loss_mask)
