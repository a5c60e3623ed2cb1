"""Held-out loss, the same number whatever the layout."""

import numpy as np

from moexpand.data.loader import MicroBatch, PackedData
from moexpand.parallel import cpu
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.engine import Engine
from moexpand.parallel.ranks import Ranks


def held_out_loss(engine: Engine, data: PackedData, packs: int, micro_batch: int, here: Ranks) -> tuple[float, int]:
    """Loss per unmasked token of the first `packs` held-out packs, and the number of those tokens.

    Ranks that exchange tokens need equally many micro-batches, so the last ones repeat with nothing counted.
    """
    batches = data.held_out(packs, micro_batch)
    while len(batches) % here.data_size:
        batches.append(_masked(batches[0]))
    mine = batches[here.data_rank :: here.data_size]
    return engine.evaluate([PackedBatch.from_arrays(batch, cpu.device()) for batch in mine])


def _masked(batch: MicroBatch) -> MicroBatch:
    return MicroBatch(batch.tokens, batch.labels, np.zeros_like(batch.loss_mask), batch.positions, batch.cu_seqlens)
