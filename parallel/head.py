"""The head and its loss in one: logits are made, used and overwritten chunk by chunk, never as a whole [T, V].

The chunk's gradients are computed beside its loss (after Liger Kernel, arXiv 2410.10989, section 3.2), so that the backward pass
only scales them: no logits are kept, and the softmax stays in the cache between its passes. The vocabulary may be split over the
tensor-parallel ranks.

Legend: T tokens, C tokens of a chunk, H hidden, V rows of the vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist

CPU_CHUNK_BYTES = 2**24
"""Logits of a chunk on a CPU: about what the last cache holds."""

GPU_CHUNK_BYTES = 2**29
"""Logits of a chunk on a GPU: large enough for matrix products at full speed."""


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk, a multiple of 16."""
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(16, limit // (4 * vocabulary) // 16 * 16)


class _HeadLoss(torch.autograd.Function):
    """Sum over tokens of mask * -log softmax(W h)[label]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, mask_T: torch.Tensor, group: Any
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        learning = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=wide, device=hidden_TH.device)
        d_hidden_TH = torch.empty_like(hidden_TH) if learning else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if learning else None
        size = chunk_tokens(len(weight_VH), hidden_TH.device)
        logits = hidden_TH.new_empty(min(size, len(hidden_TH)), len(weight_VH))  # every chunk's, one after the other
        local_T = labels_T - group.rank() * len(weight_VH)
        for start in range(0, len(hidden_TH), size):
            span = slice(start, start + size)
            hidden_CH = hidden_TH[span]
            logits_CV = torch.mm(hidden_CH, weight_VH.t(), out=logits[: len(hidden_CH)])
            loss, d_logits_CV = _chunk(logits_CV, local_T[span], mask_T[span], group, learning)
            total += loss
            if d_logits_CV is None or d_hidden_TH is None or d_weight_VH is None:
                continue
            torch.mm(d_logits_CV, weight_VH, out=d_hidden_TH[span])
            if d_logits_CV.dtype == wide:
                d_weight_VH.addmm_(d_logits_CV.t(), hidden_CH)
            else:
                d_weight_VH += d_logits_CV.t() @ hidden_CH
        if d_hidden_TH is not None and d_weight_VH is not None:
            ctx.save_for_backward(d_hidden_TH, d_weight_VH.to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_TH, d_weight_VH = ctx.saved_tensors
        scale = gradient.to(d_hidden_TH.dtype)
        return d_hidden_TH.mul_(scale), d_weight_VH.mul_(scale), None, None, None


def _chunk(
    logits_CV: torch.Tensor, local_C: torch.Tensor, mask_C: torch.Tensor, group: Any, learning: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of a chunk, and mask * (softmax - onehot) in the logits' dtype where it is wanted; the logits are overwritten.

    Args:
        local_C: labels counted from this rank's first row; other ranks' are outside 0 ... V - 1.
    """
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    peak_C = wide_CV.amax(-1)
    if group.size() > 1:
        dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=group)
    mine_C = (local_C >= 0) & (local_C < wide_CV.shape[1])
    index_C1 = local_C.clamp(0, wide_CV.shape[1] - 1)[:, None]
    label_logit_C = (wide_CV.gather(1, index_C1)[:, 0] - peak_C) * mine_C
    exponentials_CV = wide_CV.sub_(peak_C[:, None]).exp_()
    sums_2C = torch.stack((exponentials_CV.sum(-1), label_logit_C))
    if group.size() > 1:
        dist.all_reduce(sums_2C, group=group)
    mask_C = mask_C.to(sums_2C.dtype)
    loss = ((sums_2C[0].log() - sums_2C[1]) * mask_C).sum()
    if not learning:
        return loss, None
    d_logits_CV = exponentials_CV.mul_((mask_C / sums_2C[0])[:, None])
    d_logits_CV.scatter_add_(1, index_C1, -(mask_C * mine_C)[:, None])
    return loss, d_logits_CV.to(logits_CV.dtype)


def head_loss(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, mask_T: torch.Tensor, group: Any
) -> torch.Tensor:
    """Sum of the losses of the tokens that count, a scalar in fp32 or wider.

    Args:
        hidden_TH: after the last norm; the same on all ranks of `group`. Its gradient is this rank's share.
        weight_VH: this rank's rows of the head.
        labels_T: int64, over the whole vocabulary.
        mask_T: 1 where the label counts, 0 elsewhere.
        group: tensor-parallel process group; rank r holds the vocabulary's rows r*V ... r*V + V - 1.
    """
    return _HeadLoss.apply(hidden_TH, weight_VH, labels_T, mask_T, group)


def gather_vocabulary(logits_TV: torch.Tensor, group: Any) -> torch.Tensor:
    """Logits over the whole vocabulary from those of all ranks' rows."""
    if group.size() == 1:
        return logits_TV
    pieces = [torch.empty_like(logits_TV) for _ in range(group.size())]
    dist.all_gather(pieces, logits_TV.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)
