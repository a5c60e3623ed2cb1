"""A pipeline stage: Megatron-Core's GPTModel with positions, pictures, time series and a loss of our own.

Queries and keys are turned by tables that are made once a micro-batch (rotary.py), features of pictures and series take
their tokens' places behind the embedding (fusion.py), and the last part turns hidden states into a loss without keeping logits
(head.py).
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region

from moexpand.parallel import fusion
from moexpand.parallel.batch import Stream
from moexpand.parallel.head import head_loss
from moexpand.parallel.rotary import Rotary
from moexpand.parallel.shape import ModelShape
from moexpand.parallel.time_series import TimeSeriesEncoder
from moexpand.parallel.vision import VisionTower


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

    def __init__(self, *args: Any, shape: ModelShape, recompute: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rotary = Rotary(shape, self.config.params_dtype)
        self.vision: VisionTower | None = None
        self.time_series: TimeSeriesEncoder | None = None
        if self.pre_process and shape.vision is not None:
            self.vision = VisionTower(shape.vision, self.config.params_dtype, recompute)
        if self.pre_process and shape.time_series is not None:
            self.time_series = TimeSeriesEncoder(shape.time_series, self.config.params_dtype, recompute)
        for encoder in (self.vision, self.time_series):
            for parameter in encoder.parameters() if encoder is not None else ():
                # The tensor-parallel ranks compute different pictures and series, so that their gradients are added up.
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        if self.post_process:
            # Megatron-Core builds this layer itself and can be told no other; ours has the same state.
            self.output_layer.__class__ = Head

    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **others: Any) -> Any:
        stream: Stream = packed_seq_params
        assert stream.positions is not None
        stream.rotary = self.rotary(stream.positions)
        hidden, *rest = super()._preprocess(*args, packed_seq_params=stream, **others)
        if self.vision is not None:
            features = fusion.picture_features(stream.pictures, self.vision)
            hidden, stream.deep = fusion.insert(hidden, features, self._own_places(stream, stream.feature_at))
        if self.time_series is not None:
            features = fusion.series_features(stream.series, self.time_series)
            hidden, _ = fusion.insert(hidden, features, self._own_places(stream, stream.series_at))
        return hidden, *rest

    def _own_places(self, stream: Stream, feature_at: torch.Tensor | None) -> torch.Tensor:
        """Which feature stands at each token of this rank."""
        if feature_at is None:  # tokens without a place for one
            assert stream.positions is not None
            feature_at = torch.full((stream.positions.shape[-1],), -1, device=stream.positions.device)
        if self.config.sequence_parallel:
            return feature_at.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return feature_at

    def sharded_state_dict(self, *args: Any, **options: Any) -> Any:
        """Megatron-Core's; tables that every stage holds are stored once."""
        state = super().sharded_state_dict(*args, **options)
        stage = self.pg_collection.pp.rank() + self.pg_collection.pp.size() * (self.vp_stage or 0)
        for tensor in state.values():
            if getattr(tensor, "key", "").startswith("rotary."):
                tensor.replica_id = (stage, *tensor.replica_id[1:])
        return state

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
