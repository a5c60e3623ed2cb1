"""Matrix products in block FP8 on any device: the numbers of Transformer Engine's blockwise recipe, in ordinary torch.

Operands are rounded to FP8 and back (block_fp8.py), and multiplied in their own dtype, which holds the rounded numbers exactly.
So this is the reference for real FP8 kernels, and a way to train with their rounding where there are none.

    y  = x^ w^T        x^ in blocks of 1 x 128 along K, w^ of 128 x 128
    dx = dy^ w^        dy^ in blocks of 1 x 128 along N
    dw = dy~^T x~      x~ and dy~ in blocks of 128 x 1, along the tokens

Each operand is rounded along the dimension that its product sums over. The weight's gradient is in the weight's dtype.

Legend: T tokens, K inputs, N outputs, E experts, R rows sorted by expert.
"""

from typing import Any

import torch

from moexpand.base.block_fp8 import ACTIVATIONS, WEIGHTS, round_trip

ALONG_TOKENS = (128, 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rounded = round_trip(weight, WEIGHTS)
        ctx.save_for_backward(x, rounded)
        return round_trip(x, ACTIVATIONS) @ rounded.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, rounded = ctx.saved_tensors
        d_x = round_trip(gradient, ACTIVATIONS) @ rounded
        d_weight = round_trip(gradient, ALONG_TOKENS).T @ round_trip(x, ALONG_TOKENS)
        return d_x, d_weight


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] by weight [N, K] to [..., N], rounded to FP8 forward and backward; both of one dtype, bf16 or wider."""
    return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def fp8_grouped_linear(x: torch.Tensor, weights: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Each expert's rows by its own weights; blocks of rows end where an expert's rows end.

    Args:
        x: [R, K], sorted by expert.
        weights: [E, N, K].
        rows: of each expert, adding up to R.

    Returns:
        [R, N].
    """
    parts = [fp8_linear(part, weight) for part, weight in zip(x.split(rows), weights, strict=True)]
    return torch.cat(parts)
