"""Cross entropy of logits whose vocabulary is split over the tensor-parallel ranks.

Legend: T tokens, V rows of the vocabulary on this rank.
"""

from typing import Any

import torch


class _SplitCrossEntropy(torch.autograd.Function):
    """-log softmax(z)[label], with maximum, denominator and the label's logit summed over the group.

    The gradient softmax(z) - onehot(label) is kept instead of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, group: Any, first_row: int) -> torch.Tensor:
        wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        peak_T = wide.amax(-1)
        if group.size() > 1:
            torch.distributed.all_reduce(peak_T, op=torch.distributed.ReduceOp.MAX, group=group)
        shifted_TV = wide - peak_T[:, None]
        local_T = labels_T - first_row
        mine_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
        index_T1 = local_T.clamp(0, logits_TV.shape[1] - 1)[:, None]
        label_logit_T = shifted_TV.gather(1, index_T1)[:, 0] * mine_T
        exponentials_TV = shifted_TV.exp_()
        sums_2T = torch.stack((exponentials_TV.sum(-1), label_logit_T))
        if group.size() > 1:
            torch.distributed.all_reduce(sums_2T, group=group)
        probabilities_TV = exponentials_TV.div_(sums_2T[0][:, None])
        ctx.save_for_backward(probabilities_TV, index_T1, mine_T)
        ctx.dtype = logits_TV.dtype
        return sums_2T[0].log() - sums_2T[1]

    @staticmethod
    def backward(ctx: Any, gradient_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities_TV, index_T1, mine_T = ctx.saved_tensors
        gradient_T1 = gradient_T.to(probabilities_TV.dtype)[:, None]
        gradient_TV = probabilities_TV.mul_(gradient_T1)  # in place: the largest tensor of the step is needed no more
        gradient_TV.scatter_add_(1, index_T1, -gradient_T1 * mine_T[:, None])
        return gradient_TV.to(ctx.dtype), None, None, None


def split_cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor, group: Any) -> torch.Tensor:
    """Loss of every token, fp32 or wider [T].

    Args:
        logits_TV: this rank's columns of the logits.
        labels_T: int64, over the whole vocabulary.
        group: tensor-parallel process group; rank r holds the vocabulary's rows r*V ... r*V + V - 1.
    """
    return _SplitCrossEntropy.apply(logits_TV, labels_T, group, group.rank() * logits_TV.shape[1])
