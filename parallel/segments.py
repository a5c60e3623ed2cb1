"""Segments of a stream, computed together where they are equally long."""

from collections.abc import Callable, Iterable

import torch


def by_length(
    segments: Iterable[tuple[int, int]],
    compute: Callable[..., torch.Tensor],
    *streams: torch.Tensor,
) -> torch.Tensor:
    """What `compute` makes of whole segments, all of one length together, in the order of the stream.

    Args:
        segments: first token and the one after the last of each; they fill the stream.
        compute: called with the tokens [B*S, ...] of B segments from each stream, and S; returns [B*S, ...].
        streams: tensors [t, ...].
    """
    starts_of: dict[int, list[int]] = {}
    for start, stop in segments:
        if stop > start:
            starts_of.setdefault(stop - start, []).append(start)
    if len(starts_of) == 1:
        return compute(*streams, next(iter(starts_of)))
    rows_of, outputs = [], []
    for length, starts in sorted(starts_of.items()):
        first = torch.tensor(starts, device=streams[0].device)
        rows = (first[:, None] + torch.arange(length, device=streams[0].device)).flatten()
        rows_of.append(rows)
        outputs.append(compute(*(stream.index_select(0, rows) for stream in streams), length))
    back = torch.cat(rows_of).argsort()
    return torch.cat(outputs).index_select(0, back)
