"""Segments of a stream, computed together where they are equally long."""

from collections.abc import Callable, Iterable

import torch


class Segments:
    """Segments that fill a stream; which tokens go together is looked up once, for all layers.

    Args:
        bounds: first token and the one after the last of each.
        device: of the streams.
    """

    def __init__(self, bounds: Iterable[tuple[int, int]], device: torch.device) -> None:
        starts_of: dict[int, list[int]] = {}
        for start, stop in bounds:
            if stop > start:
                starts_of.setdefault(stop - start, []).append(start)
        self._lengths = sorted(starts_of)
        self._rows: list[torch.Tensor] = []
        if len(starts_of) > 1:
            within = (torch.tensor(starts_of[length])[:, None] + torch.arange(length) for length in self._lengths)
            self._rows = [rows.flatten().to(device) for rows in within]
            self._back = torch.cat(self._rows).argsort()

    def compute(self, function: Callable[..., torch.Tensor], *streams: torch.Tensor) -> torch.Tensor:
        """What a function makes of whole segments, all of one length together, in the order of the stream.

        Args:
            function: called with the tokens [B*S, ...] of B segments from each stream, and S; returns [B*S, ...].
            streams: tensors [t, ...].
        """
        if not self._rows:
            return function(*streams, self._lengths[0])
        outputs = [
            function(*(stream.index_select(0, rows) for stream in streams), length)
            for length, rows in zip(self._lengths, self._rows, strict=True)
        ]
        return torch.cat(outputs).index_select(0, self._back)
