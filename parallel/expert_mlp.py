"""SwiGLU experts over stacked weights: permutation, grouped matrix products and combination as one differentiable function.

Written as one function with its own backward pass for three reasons: rows are gathered again instead of being kept (they are K
times the tokens), sums over a token's rows are bag sums (no atomics, so the same bits every time), and nothing is computed
that the backward pass can take from what the forward pass has.

Legend: U tokens, C experts that a token visits here, R rows (token copies, sorted by expert; see rows.py), E local experts,
H hidden, I intermediate.
"""

from typing import Any

import torch
from torch.nn.functional import embedding_bag, silu

from moexpand.parallel.rows import Rows


class InnerSums:
    """Sum of what each expert holds before its down projection, without the router's weights, and the number of rows behind it.

    The down projection is linear, so that down @ (sum / rows) is the mean of an expert's outputs.

    Attributes:
        sums: [E, I], fp32 or wider.
        rows: int64 [E].
    """

    def __init__(self, down: torch.Tensor) -> None:
        experts, _, inner = down.shape
        wide = torch.promote_types(down.dtype, torch.float32)
        self.sums = torch.zeros(experts, inner, dtype=wide, device=down.device)
        self.rows = torch.zeros(experts, dtype=torch.int64, device=down.device)

    def add(self, inner_RI: torch.Tensor, rows: Rows) -> None:
        """Add the rows of all experts."""
        starts_E = rows.counts.cumsum(0) - rows.counts
        self.sums += embedding_bag(rows.real(len(inner_RI)), inner_RI.to(self.sums.dtype), offsets=starts_E, mode="sum")
        self.rows += rows.counts


class _Scratch:
    """Memory for gathered rows on a CPU, kept between calls: fresh memory of that size costs more than the copy into it.

    What it holds is only good until the next rows are gathered. GPUs have an allocator that keeps memory by itself.
    """

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.Tensor] = {}

    def gather(self, x: torch.Tensor, token_of_row: torch.Tensor | None) -> torch.Tensor:
        """The rows [R, H] of tokens [U, H]."""
        if token_of_row is None:
            return x
        if x.device.type != "cpu":
            return x.index_select(0, token_of_row)
        elements = len(token_of_row) * x.shape[1]
        kept = self._memory.get(x.dtype)
        if kept is None or kept.numel() < elements:
            kept = self._memory[x.dtype] = torch.empty(elements, dtype=x.dtype)
        return torch.index_select(x, 0, token_of_row, out=kept[:elements].view(-1, x.shape[1]))


_scratch = _Scratch()


class _ExpertMLP(torch.autograd.Function):
    """y = sum over visits of w * down(silu(gate x) * up x); see `expert_mlp`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        rows: Rows,
        inner_sums: InnerSums | None,
    ) -> torch.Tensor:
        x_RH = _scratch.gather(x, rows.token_of_row)
        w_R = rows.spread(weights)
        gate_up_R2I = rows.times(x_RH, gate_up.transpose(1, 2))
        gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
        inner_RI = silu(gate_RI).mul_(up_RI)
        if inner_sums is not None:
            inner_sums.add(inner_RI, rows)
        inner_RI.mul_(w_R.to(x.dtype)[:, None])
        out_RH = rows.times(inner_RI, down.transpose(1, 2))
        ctx.save_for_backward(x, w_R, gate_up_R2I, gate_up, down)
        ctx.rows, ctx.weights_shape = rows, weights.shape
        return out_RH if rows.row_of_visit is None else _sum_visits(out_RH, rows.row_of_visit)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w_R, gate_up_R2I, gate_up, down = ctx.saved_tensors
        rows: Rows = ctx.rows
        gradient_RH = _scratch.gather(gradient.contiguous(), rows.token_of_row)
        gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
        weight_R1 = w_R.to(x.dtype)[:, None]
        d_weighted_RI = rows.times(gradient_RH, down)
        active_RI = silu(gate_RI)
        inner_RI = active_RI * up_RI
        d_w_R = (d_weighted_RI * inner_RI).sum(-1, dtype=w_R.dtype)
        d_down = rows.outer(gradient_RH, inner_RI.mul_(weight_R1))
        d_inner_RI = d_weighted_RI.mul_(weight_R1)
        d_gate_up_R2I = torch.empty_like(gate_up_R2I)
        d_gate_RI, d_up_RI = d_gate_up_R2I.chunk(2, dim=-1)
        torch.mul(d_inner_RI, active_RI, out=d_up_RI)
        torch.ops.aten.silu_backward.grad_input(d_inner_RI.mul_(up_RI), gate_RI, grad_input=d_gate_RI)
        x_RH = _scratch.gather(x, rows.token_of_row)  # where the gradient's rows were
        d_gate_up = rows.outer(d_gate_up_R2I, x_RH)
        d_x_RH = rows.times(d_gate_up_R2I, gate_up)
        if rows.row_of_visit is None:
            return d_x_RH, d_w_R, d_gate_up, d_down, None, None
        d_weights = d_w_R.index_select(0, rows.row_of_visit.flatten()).view(ctx.weights_shape)
        return _sum_visits(d_x_RH, rows.row_of_visit), d_weights, d_gate_up, d_down, None, None


def _sum_visits(rows_RH: torch.Tensor, row_of_visit_UC: torch.Tensor) -> torch.Tensor:
    """Each token's rows added up: [R, H] -> [U, H]."""
    return embedding_bag(row_of_visit_UC, rows_RH, mode="sum")


def expert_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    rows: Rows,
    inner_sums: InnerSums | None = None,
) -> torch.Tensor:
    """Run tokens through the experts that they visit.

    Args:
        x: tokens [U, H], or the sorted rows [R, H] where `rows` is `Rows.given`.
        weights: the router's weight of every visit, [U, C] or [R]; fp32 or wider.
        gate_up: [E, 2I, H], the gate's rows first.
        down: [E, H, I].
        inner_sums: is added to, where given.

    Returns:
        [U, H], weighted and added up over a token's visits, or [R, H], weighted.
    """
    return _ExpertMLP.apply(x, weights, gate_up, down, rows, inner_sums)
