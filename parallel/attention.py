"""Causal core attention over packed sequences, given where each begins (cu_seqlens).

Megatron-Core's own attention without Transformer Engine takes no packed sequences. This one runs torch's scaled dot-product
attention once for each distinct segment length, all segments of a length together, so that no score between two samples is
ever computed.

Legend: T tokens of the packed stream, N query heads, M key/value heads, D head width, S length of a segment.
"""

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedAttention(torch.nn.Module):
    """The `core_attention` of Megatron-Core's SelfAttention. It holds no parameters."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend causally inside every segment.

        Args:
            query: [T, 1, N, D].
            key, value: [T, 1, M, D], M a divisor of N.
            attention_mask, attn_mask_type, attention_bias: part of Megatron-Core's signature; the segments alone decide.
            packed_seq_params: `cu_seqlens_q` holds the segments' boundaries, int32 [segments + 1] on the CPU.

        Returns:
            [T, 1, N * D].
        """
        assert packed_seq_params is not None
        tokens, _, heads, width = query.shape
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        by_length: dict[int, list[int]] = {}
        for start, stop in pairwise(bounds):
            if stop > start:
                by_length.setdefault(stop - start, []).append(start)
        query_TND, key_TMD, value_TMD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if len(by_length) == 1:
            length = next(iter(by_length))
            return self._attend(query_TND, key_TMD, value_TMD, length).reshape(tokens, 1, heads * width)
        rows_of, outputs = [], []
        for length, starts in sorted(by_length.items()):
            first = torch.tensor(starts, device=query.device)
            rows = (first[:, None] + torch.arange(length, device=query.device)).flatten()
            rows_of.append(rows)
            query_RND, key_RMD, value_RMD = (each.index_select(0, rows) for each in (query_TND, key_TMD, value_TMD))
            outputs.append(self._attend(query_RND, key_RMD, value_RMD, length))
        back = torch.cat(rows_of).argsort()
        return torch.cat(outputs).index_select(0, back).reshape(tokens, 1, heads * width)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int) -> torch.Tensor:
        """Segments of one length, one behind the other: [B*S, heads, D] -> [B*S, N, D]."""

        def batched(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (-1, length)).transpose(1, 2)

        output = torch.nn.functional.scaled_dot_product_attention(
            batched(query),
            batched(key),
            batched(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).flatten(0, 1)
