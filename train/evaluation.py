"""Held-out loss, the same number whatever the layout."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moexpand.data.loader import MicroBatch, PackedData, unigram_entropy
from moexpand.parallel import cpu
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.engine import Engine


class HeldOut:
    """The first packs of the held-out samples, and what a model without context would make of them.

    Args:
        packs: how many (fewer where the held-out samples do not fill as many).
        micro_batch: packs of a forward pass.
    """

    def __init__(self, data: PackedData, packs: int, micro_batch: int, engine: Engine) -> None:
        here = engine.ranks
        batches = data.held_out(packs, micro_batch)
        self._unigram_entropy = unigram_entropy(batches)
        # Ranks that exchange tokens need equally many micro-batches, so the last ones repeat with nothing counted.
        batches += [_masked(batches[0])] * (-len(batches) % here.data_size)
        self._mine = [
            PackedBatch.from_arrays(batch, cpu.device(), engine.shape, data.pixel_table)
            for batch in batches[here.data_rank :: here.data_size]
        ]

    def evaluate(self, engine: Engine, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Loss per unmasked token, the number of those tokens, the entropy of their own frequencies (losses in nats).

        Args:
            interrupted: asked on all ranks together between batches; when it says so nothing is returned.
        """
        size = engine.layout.pipeline  # as many as fill the stages
        loss_sum, tokens = 0.0, 0
        for first in range(0, len(self._mine), size):
            if interrupted():
                return None
            loss, count = engine.evaluate(self._mine[first : first + size])
            loss_sum, tokens = loss_sum + loss * count, tokens + count
        return {
            "held_out_loss": loss_sum / max(tokens, 1),
            "held_out_tokens": tokens,
            "unigram_entropy": self._unigram_entropy,
        }


def _masked(batch: MicroBatch) -> MicroBatch:
    return replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
