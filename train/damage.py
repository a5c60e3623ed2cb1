"""What a conversion costs before any training: the loss of source and target on the same tokens.

A worker: `torchrun ... -m moexpand.train.damage key=value ...`. Both models are run one after the other, so that one at a time is
in memory.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moexpand.base.errors import InputError
from moexpand.conf.check import check_layout, check_sequence
from moexpand.conf.fields import changed
from moexpand.conf.schema import ConvertCommand
from moexpand.data.loader import PackedData
from moexpand.data.stream import Reading
from moexpand.train.preflight import check_vocabulary, open_supported
from moexpand.train.worker import work
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.conversion import Conversion
from moexpand.upcycle.logical import StoredWeights, unsupported

if TYPE_CHECKING:
    from moexpand.parallel.ranks import Ranks


def check(config: ConvertCommand, source: Checkpoint, conversion: Conversion) -> PackedData | None:
    """Open the shards and check that both models and the layout can be measured; None where nothing is to be measured."""
    if config.measure.shards is None:
        _refuse_layout(config)
        return None
    lacking = unsupported(source)
    if lacking:
        raise InputError(f"{source.folder} has {lacking}, so nothing can be measured; leave measure.shards out.")
    for architecture in (source.architecture, conversion.architecture):
        check_layout(config.parallel, architecture, config.precision.name, config.processes, "processes")
    check_sequence("measure.seq_length", config.measure.seq_length, config.parallel)
    return _open(config, source)


def _refuse_layout(config: ConvertCommand) -> None:
    """Keys of the measurement have no effect without it."""
    parts = (config.measure, "measure"), (config.parallel, "parallel"), (config.precision, "precision")
    given = [key for part, name in parts for key in changed(part, name)]
    if config.processes != ConvertCommand.processes:
        given.append(f"processes={config.processes}")
    if given:
        raise InputError(f"{given[0]} is for measuring and nothing is measured; give measure.shards as well, or leave it out.")


def _open(config: ConvertCommand, source: Checkpoint) -> PackedData:
    """Text alone: a picture is counted differently by the two models, or seen by one of them."""
    shards = str(config.measure.shards)
    data = PackedData(Path(shards), config.measure.seq_length, 1, config.seed, held_out=0.0, reading=Reading(answers_only=False))
    check_vocabulary(data, shards, source.architecture)
    return data


def run_worker(config: ConvertCommand) -> None:
    """Measure on this rank's share of the sequences; the first rank says what was found."""
    from moexpand.parallel import ranks
    from moexpand.train.setup import layout_of

    source = open_supported(config.source)
    data = _open(config, source)
    lengths = np.cumsum(data.loss_tokens())
    sequences = min(int(np.searchsorted(lengths, config.measure.tokens)) + 1, len(lengths))
    here = ranks.start(layout_of(config.parallel), config.parallel.timeout_seconds)
    before = _log_probabilities(config, source, data, sequences, here)
    after = _log_probabilities(config, open_supported(config.target), data, sequences, here)
    if here.main:
        print(told(before, after), flush=True)
    ranks.barrier()
    ranks.stop()


def told(before: np.ndarray, after: np.ndarray) -> str:
    """The sentence about log-probabilities [N] of the same tokens by source and target."""
    change = before - after
    error = float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else 0.0
    losses = f"loss {-before.mean():.4f} -> {-after.mean():.4f} ({change.mean():+.4f} +- {error:.4f})"
    return (
        f"Step 0 on {len(change):,} tokens: {losses}, "
        f"log-probability of a token changed by {np.abs(change).mean():.4f} on average and {np.abs(change).max():.4f} at most."
    )


def _log_probabilities(
    config: ConvertCommand, checkpoint: Checkpoint, data: PackedData, sequences: int, here: "Ranks"
) -> np.ndarray:
    """float64 [N] of the unmasked tokens of all sequences, on every rank."""
    import torch

    from moexpand.parallel import cpu, ranks
    from moexpand.parallel.batch import PackedBatch
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import RouterRules
    from moexpand.train import weights
    from moexpand.train.setup import layout_of, shape_of

    engine = Engine(shape_of(checkpoint.architecture), layout_of(config.parallel), RouterRules(), config.precision.name, here)
    weights.load(engine, StoredWeights(checkpoint))
    found: dict[int, np.ndarray] = {}
    for number in range(here.data_rank, sequences + -sequences % here.data_size, here.data_size):
        arrays = data.batch(number % sequences)[0]
        outputs, _ = engine.logits([PackedBatch.from_arrays(arrays, cpu.device())])
        if outputs:
            wide = outputs[0].double().log_softmax(-1)
            labels = torch.from_numpy(arrays.labels).to(wide.device)[:, None]
            found[number % sequences] = wide.gather(1, labels)[:, 0].cpu().numpy()[arrays.loss_mask > 0]
    together = {number: values for each in ranks.gather(found) for number, values in each.items()}
    return np.concatenate([together[number] for number in range(sequences)])


def result_folder(config: ConvertCommand) -> Path:
    """Where workers leave their result and their log, beside the target; removed when all went well."""
    return Path(f"{config.target}.run")


if __name__ == "__main__":
    sys.exit(work("convert", sys.argv[1:], result_folder, run_worker))
