"""Held-out loss, the same number whatever the layout."""

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

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Loss per unmasked token, the number of those tokens, the entropy of their own frequencies (all in nats)."""
        loss, tokens = engine.evaluate(self._mine)
        return {"held_out_loss": loss, "held_out_tokens": tokens, "unigram_entropy": self._unigram_entropy}


def _masked(batch: MicroBatch) -> MicroBatch:
    return replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
