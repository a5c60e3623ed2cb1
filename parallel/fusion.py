"""Features of pictures and of time series take the places of their tokens behind the embedding, on the first pipeline stage.

The ranks that share a stream (tensor and context parallel) share out its pictures and its series, compute their features and
gather them, and each keeps those that stand at its own tokens. DeepStack adds further features to the outputs of first layers.

Legend: t tokens of this rank, n features of the whole stream, r features at this rank's tokens, D DeepStack layers, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from moexpand.base.series import tokens_of
from moexpand.parallel.pictures import Pictures, deal, features_of
from moexpand.parallel.time_series import Series, TimeSeriesEncoder
from moexpand.parallel.vision import VisionTower


@dataclass(frozen=True)
class DeepFeatures:
    """What DeepStack adds: features [r, H] of each of the first layers, at these tokens, int64 [r]."""

    rows: torch.Tensor
    of_layer: list[torch.Tensor]


class FusedLayer(TransformerLayer):
    """A decoder layer to whose output DeepStack's features of its number, if there are any, are added."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron-Core's, which is given the `Stream` by name."""
        hidden_t1H, context = super().forward(*args, **kwargs)
        deep: DeepFeatures | None = kwargs["packed_seq_params"].deep
        if deep is not None and self.layer_number <= len(deep.of_layer):
            hidden_t1H = hidden_t1H.index_add(0, deep.rows, deep.of_layer[self.layer_number - 1][:, None])
        return hidden_t1H, context


def insert(hidden_t1H: torch.Tensor, features_nDH: torch.Tensor, feature_at_t: torch.Tensor) -> tuple[torch.Tensor, DeepFeatures]:
    """The embedding's output with features at their tokens, and what DeepStack will add.

    Args:
        hidden_t1H: [t, 1, H].
        features_nDH: [n, 1 + D, H] of the whole stream.
        feature_at_t: int64 [t], see `pictures.feature_at`.
    """
    rows = (feature_at_t >= 0).nonzero()[:, 0]
    own = features_nDH.index_select(0, feature_at_t[rows])
    deep: list[torch.Tensor] = []
    return _Insertion.apply(hidden_t1H, own, rows, deep), DeepFeatures(rows, deep)


class _Insertion(torch.autograd.Function):
    """Puts the first of each place's features behind the embedding and hands out the others, for the layers to add.

    The others are leaves of their own, as a layer that is computed again in the backward pass must not walk back into the tower:
    their gradients add up there, and are complete when the gradient of the embedding's output arrives here.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_t1H: torch.Tensor, features_rDH: torch.Tensor, rows: torch.Tensor, deep: list[torch.Tensor]
    ) -> torch.Tensor:
        main, *others = features_rDH.unbind(1)
        deep += [each.clone().requires_grad_(ctx.needs_input_grad[1]) for each in others]
        ctx.rows, ctx.deep = rows, deep
        return hidden_t1H.index_copy(0, rows, main[:, None])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_main = gradient.index_select(0, ctx.rows)[:, 0]
        d_features = None
        if ctx.needs_input_grad[1]:
            d_deep = [torch.zeros_like(each) if each.grad is None else each.grad for each in ctx.deep]
            d_features = torch.stack([d_main, *d_deep], dim=1)
        return gradient.index_fill(0, ctx.rows, 0.0), d_features, None, None


def picture_features(pictures: Pictures | None, tower: VisionTower) -> torch.Tensor:
    """Features [n, 1 + D, H] of all pictures, in their order, on every rank that shares the stream."""
    shape, grids = tower.shape, [] if pictures is None else pictures.grids

    def compute(own: list[int]) -> torch.Tensor:
        assert pictures is not None
        return tower(pictures.pixels(own, shape.temporal_patch_size), [grids[number] for number in own])

    def blank() -> torch.Tensor:
        merge, width = shape.spatial_merge_size, shape.in_channels * shape.temporal_patch_size * shape.patch_size**2
        return tower(torch.zeros(merge**2, width, device=tower.pos_embed.weight.device), [(1, merge, merge)])

    def none() -> torch.Tensor:
        size = (0, 1 + len(shape.deepstack_visual_indexes), shape.out_hidden_size)
        return torch.zeros(size, dtype=tower.dtype, device=tower.pos_embed.weight.device)

    costs = [frames * rows * columns for frames, rows, columns in grids]
    sizes = [features_of(grid, shape.spatial_merge_size) for grid in grids]
    return _shared_out(costs, sizes, compute, blank if _learns(tower) else none)


def series_features(series: Series | None, encoder: TimeSeriesEncoder) -> torch.Tensor:
    """Features [n, 1, H] of all time series, in their order, on every rank that shares the stream."""
    values, rates = ([], []) if series is None else (series.values, series.rates)
    device = encoder.projector.linear_1.weight.device

    def compute(own: list[int]) -> torch.Tensor:
        features = encoder([values[number].to(device) for number in own], [rates[number] for number in own])
        return torch.cat(features)[:, None]

    def blank() -> torch.Tensor:
        return encoder([torch.zeros(1, 1, device=device)], [1.0])[0][:, None]

    def none() -> torch.Tensor:
        return torch.zeros(0, 1, encoder.shape.out_hidden_size, dtype=encoder.dtype, device=device)

    sizes = [tokens_of(len(each), rate) for each, rate in zip(values, rates, strict=True)]
    return _shared_out([each.numel() for each in values], sizes, compute, blank if _learns(encoder) else none)


def _learns(module: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())


def _shared_out(
    costs: Sequence[int], sizes: Sequence[int], compute: Callable[[list[int]], torch.Tensor], blank: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Features of all things that have them, in their order; each rank that shares the stream computes a hand of them.

    Args:
        costs: of each, to share them out by.
        sizes: features of each.
        compute: makes the features of some, by their numbers.
        blank: features of nothing, by way of the whole module where it learns: every parameter gets a gradient on every rank, if
            of zero. None of them is used.
    """
    group = parallel_state.get_tensor_and_context_parallel_group()
    hands = deal(costs, group.size())
    own = hands[group.rank()]
    features = compute(own) if own else blank()[:0]
    if group.size() == 1 or not costs:
        return features
    dealt = [number for hand in hands for number in hand]
    gathered = _Gathering.apply(features, [sum(sizes[number] for number in hand) for hand in hands], group)
    of_each = dict(zip(dealt, gathered.split([sizes[number] for number in dealt]), strict=True))
    return torch.cat([of_each[number] for number in range(len(costs))])


class _Gathering(torch.autograd.Function):
    """All ranks' features, rank by rank; every rank's gradient of a feature goes back to the rank that computed it."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        padded = features.new_zeros(max(sizes), *features.shape[1:])
        padded[: len(features)] = features
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[ctx.group.rank()], None, None
