"""Causal core attention over packed sequences, given where each begins (cu_seqlens).

Megatron-Core's own attention without Transformer Engine takes no packed sequences and no context parallelism. This one runs
torch's scaled dot-product attention once for each distinct segment length, all segments of a length together, so that no
score between two samples is ever computed. Under context parallelism every rank holds two chunks of the stream (context.py);
keys and values are gathered, and a segment that began before the chunk attends with its earlier keys.

Legend: T tokens of the packed stream, t of them on this rank, N query heads, M key/value heads, D head width.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from moexpand.parallel import context
from moexpand.parallel.batch import Stream


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
        """Turn queries and keys by their positions and attend causally inside every segment.

        Args:
            query: [t, 1, N, D].
            key, value: [t, 1, M, D], M a divisor of N.
            attention_mask, attn_mask_type, attention_bias: part of Megatron-Core's signature; the segments alone decide.
            packed_seq_params: a `Stream`, whose `cu_seqlens_q` holds the segments' boundaries in the whole stream, int32
                [segments + 1] on the CPU.

        Returns:
            [t, 1, N * D].
        """
        assert isinstance(packed_seq_params, Stream)
        stream = packed_seq_params
        assert stream.rotary is not None
        tokens, _, heads, width = query.shape
        query_tND, key_tMD = (stream.rotary.turn(each.squeeze(1)) for each in (query, key))
        value_tMD = value.squeeze(1)
        size = context.group().size()
        if size == 1:
            segments = stream.segments(0, pairwise(stream.cu_seqlens_q.tolist()), query.device)
            output = segments.compute(self._attend, query_tND, key_tMD, value_tMD)
        else:
            key_TMD, value_TMD = context.gather(torch.stack((key_tMD, value_tMD), 1)).unbind(1)
            chunks = context.own_chunks(tokens * size, size, context.group().rank())
            output = torch.cat(
                [
                    self._chunk(part_ND, key_TMD, value_TMD, chunk, stream)
                    for part_ND, chunk in zip(query_tND.chunk(2), chunks, strict=True)
                ]
            )
        return output.reshape(tokens, 1, heads * width)

    def _chunk(
        self, query: torch.Tensor, key_TMD: torch.Tensor, value_TMD: torch.Tensor, chunk: range, stream: Stream
    ) -> torch.Tensor:
        """Queries [t/2, N, D] of a chunk of the stream against the keys of the whole stream."""
        outputs, pieces = [], list(_pieces(chunk, stream.cu_seqlens_q.tolist()))
        start, stop = pieces[0]
        if start < chunk.start:  # began in an earlier chunk: the mask is aligned at the end of keys and queries
            rows = stop - chunk.start
            key, value = key_TMD[None, start:stop], value_TMD[None, start:stop]
            outputs.append(self._product(query[None, :rows], key, value, attn_mask=causal_lower_right(rows, stop - start))[0])
            pieces = pieces[1:]
        if pieces:
            first = pieces[0][0]
            key, value = key_TMD[first : chunk.stop], value_TMD[first : chunk.stop]
            inside = [(start - first, stop - first) for start, stop in pieces]
            segments = stream.segments(chunk.start, inside, query.device)
            outputs.append(segments.compute(self._attend, query[first - chunk.start :], key, value))
        return torch.cat(outputs)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int) -> torch.Tensor:
        """Segments of one length, one behind the other: [B*S, heads, D] -> [B*S, N, D]."""
        batched = (each.unflatten(0, (-1, length)) for each in (query, key, value))
        return self._product(*batched, is_causal=True).flatten(0, 1)

    def _product(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **mask: Any) -> torch.Tensor:
        """[B, S, N, D] by [B, S', M, D] to [B, S, N, D]."""
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
            **mask,
        )
        return output.transpose(1, 2)


def _pieces(chunk: range, bounds: list[int]) -> Iterator[tuple[int, int]]:
    """The segments that reach into a chunk, cut off at its end, but with their true beginning."""
    for start, stop in pairwise(bounds):
        if stop > start and stop > chunk.start and start < chunk.stop:
            yield start, min(stop, chunk.stop)
