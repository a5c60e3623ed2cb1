"""How a model routes: its forward pass over shards, exact counts of every layer, and the router logits of a sample of tokens.

A worker: `torchrun ... -m moexpand.train.calibrate key=value ...`. What is routed is a pure function of shards and seed: the
first packed sequences of the first epoch, one at a time, shared out over the data-parallel ranks.
"""

import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import moexpand
from moexpand.base.errors import InputError
from moexpand.base.files import refuse_existing
from moexpand.base.random import generator
from moexpand.conf.check import check_calibrate
from moexpand.conf.schema import CalibrateCommand
from moexpand.data.loader import PackedData
from moexpand.data.stream import Reading
from moexpand.train.display import Display
from moexpand.train.preflight import check_places, check_vocabulary, open_supported
from moexpand.train.run_inputs import hears, image_settings
from moexpand.train.worker import work
from moexpand.upcycle.calibration import Origin, write_calibration
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.logical import StoredWeights

if TYPE_CHECKING:
    from moexpand.parallel.engine import Engine
    from moexpand.train.routing_counts import RoutingCounts

WAVE = 16
"""Sequences that a rank is given at once, so that pipeline stages overlap."""


@dataclass(frozen=True)
class Job:
    """What is routed.

    Attributes:
        loss_tokens: int64 [sequences], unmasked tokens of each.
        available: unmasked tokens of one pass over the shards.
        sample: int64 [N], increasing: which of the unmasked tokens of all sequences have their logits kept.
    """

    checkpoint: Checkpoint
    data: PackedData
    loss_tokens: np.ndarray
    available: int
    sample: np.ndarray

    @property
    def tokens(self) -> int:
        """Unmasked tokens in all."""
        return int(self.loss_tokens.sum())


def check(config: CalibrateCommand, world_size: int) -> Job:
    """Open model and shards, check that they, the layout and the target agree, and choose the sequences; imports no torch."""
    checkpoint = open_supported(config.checkpoint)
    check_calibrate(config, checkpoint.architecture, world_size)
    refuse_existing(Path(config.out))
    data = PackedData(
        Path(config.data.shards),
        config.seq_length,
        global_batch=1,
        seed=config.seed,
        held_out=0.0,
        tokenizer=config.data.tokenizer,
        # Every token is routed, whatever is trained on.
        reading=Reading(
            answers_only=False,
            images=image_settings(config.data, checkpoint.architecture.vision, config.checkpoint),
            series=hears(config.data, checkpoint.architecture.time_series is not None),
        ),
    )
    check_vocabulary(data, config.data.shards, checkpoint.architecture)
    check_places(data, config.data.shards, checkpoint.architecture)
    loss_tokens = data.loss_tokens()
    available = int(loss_tokens.sum())
    if not available:
        raise InputError(f"{config.data.shards} holds no sample of two tokens, so there is nothing to route.")
    enough = int(np.searchsorted(np.cumsum(loss_tokens), config.tokens)) + 1
    loss_tokens = loss_tokens[:enough]
    return Job(checkpoint, data, loss_tokens, available, spread_sample(int(loss_tokens.sum()), config.sample, config.seed))


def spread_sample(tokens: int, size: int, seed: int) -> np.ndarray:
    """int64 [min(size, tokens)], increasing: one number drawn from each of as many equal parts of 0 ... tokens - 1."""
    size = min(size, tokens)
    bounds = np.arange(size + 1) * tokens // size
    return bounds[:-1] + (generator(seed, "calibrate", "sample").random(size) * np.diff(bounds)).astype(np.int64)


def run_worker(config: CalibrateCommand) -> None:
    """Route this rank's share of the sequences; the first rank writes the folder and says how fast it went."""
    job = check(config, int(os.environ.get("WORLD_SIZE", "1")))
    from moexpand.parallel import ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import RouterRules
    from moexpand.train import weights
    from moexpand.train.routing_counts import RoutingCounts
    from moexpand.train.setup import layout_of, shape_of

    architecture, layout = job.checkpoint.architecture, layout_of(config.parallel)
    here = ranks.start(layout, config.parallel.timeout_seconds)
    engine = Engine(shape_of(architecture), layout, RouterRules(), config.precision.name, here)
    weights.load(engine, StoredWeights(job.checkpoint))
    counts = RoutingCounts(engine.routed_layers, architecture.num_experts, architecture.num_experts_per_tok, len(job.sample))
    began = time.perf_counter()
    with closing(Display(here.main, config.plain, steps=len(job.loss_tokens), label="routing")) as display:
        _route(job, engine, counts, display)
    layers, logits = {}, {}
    for layer, layer_counts, layer_logits in counts.totals():
        if here.main:
            layers[layer], logits[layer] = layer_counts, layer_logits
    if here.main:
        seconds = time.perf_counter() - began
        print(f"{job.tokens:,} tokens in {seconds:,.1f} s, {job.tokens / seconds:,.0f} a second.", flush=True)
        write_calibration(Path(config.out), _origin(config, job), layers, logits)
    ranks.barrier()
    ranks.stop()


def _route(job: Job, engine: "Engine", counts: "RoutingCounts", display: Display) -> None:
    """Walk through this rank's sequences; where they do not share out evenly, the first ones come again, uncounted."""
    here, sequences = engine.ranks, len(job.loss_tokens)
    numbers = range(here.data_rank, sequences + -sequences % here.data_size, here.data_size)
    for first in range(0, len(numbers), WAVE):
        wave = numbers[first : first + WAVE]
        _route_wave(job, engine, counts, wave)
        before, done = wave[0], min(wave[-1] + here.data_size, sequences)
        if done * 10 // sequences > before * 10 // sequences:
            display.say(f"routed {done:,} of {sequences:,} sequences")
        display.advance(done, "")


def _route_wave(job: Job, engine: "Engine", counts: "RoutingCounts", numbers: range) -> None:
    from moexpand.parallel import cpu
    from moexpand.parallel.batch import PackedBatch
    from moexpand.train.routing_counts import places_of

    batches, places, sequences = [], [], len(job.loss_tokens)
    for number in numbers:
        batch = job.data.batch(number % sequences)[0]
        counted = batch.loss_mask * (number < sequences)
        first_token = int(job.loss_tokens[: number % sequences].sum())
        batches.append(PackedBatch.from_arrays(batch, cpu.device(), engine.shape, job.data.pixel_table))
        places.append(places_of(counted, first_token, job.sample, engine.ranks.tensor_rank, engine.layout.tensor))
    engine.observe_routing(batches, lambda index, layer, logits, chosen: counts.add(layer, logits, chosen, places[index]))


def _origin(config: CalibrateCommand, job: Job) -> Origin:
    architecture = job.checkpoint.architecture
    return Origin(
        checkpoint=job.checkpoint.folder.resolve().name,
        parent=job.checkpoint.fingerprint,
        shards=job.data.corpus_fingerprint,
        tokenizer=job.data.fingerprint,
        seed=config.seed,
        seq_length=config.seq_length,
        sequences=len(job.loss_tokens),
        tokens=job.tokens,
        sample=len(job.sample),
        num_experts=architecture.num_experts,
        top_k=architecture.num_experts_per_tok,
        num_groups=architecture.router_n_groups,
        precision=config.precision.name,
        versions={"moexpand": moexpand.__version__} | {name: version(name) for name in ("torch", "megatron-core")},
    )


def result_folder(config: CalibrateCommand) -> Path:
    """Where workers leave their result and their log, beside the output folder; removed when all went well."""
    return Path(f"{config.out}.run")


if __name__ == "__main__":
    sys.exit(work("calibrate", sys.argv[1:], result_folder, run_worker))
