"""Context parallelism: a stream of tokens shared out over ranks so that causal attention costs each about the same.

The stream is cut into 2C equal chunks, and rank r of C holds chunk r and chunk 2C - 1 - r, one behind the other (the zig-zag
split of Llama 3, arXiv 2407.21783, section 3.3.2). Keys and values are gathered before attention, so that segments may begin and
end anywhere.

Legend: T tokens of the whole stream, C context-parallel ranks.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def own_chunks(tokens: int, size: int, rank: int) -> list[range]:
    """Which positions of a stream of `tokens` a rank holds, in its order."""
    assert tokens % (2 * size) == 0, f"a stream of {tokens} tokens does not split into 2 x {size} equal chunks"
    chunk = tokens // (2 * size)
    return [range(number * chunk, (number + 1) * chunk) for number in (rank, 2 * size - 1 - rank)]


def group() -> Any:
    """The context-parallel process group."""
    return parallel_state.get_context_parallel_group()


def split(per_token_T: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor whose first axis is the whole stream."""
    size = group().size()
    if size == 1:
        return per_token_T
    return torch.cat([per_token_T[chunk.start : chunk.stop] for chunk in own_chunks(len(per_token_T), size, group().rank())])


def gather(per_token_t: torch.Tensor) -> torch.Tensor:
    """The whole stream from all ranks' parts, in order; the gradient goes back as a sum over the ranks."""
    size = group().size()
    if size == 1:
        return per_token_t
    # Rank by rank, chunk r and chunk 2C - 1 - r.
    chunks = gather_from_sequence_parallel_region(per_token_t, group=group()).chunk(2 * size)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
