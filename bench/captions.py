"""Does a model look at its pictures? Its loss on captions with their own pictures against the same captions with others'.

`python bench/captions.py RUN [RUN ...]`: run folders trained on pictures, of several seeds. Every sample with one picture is
scored twice, with its own and with another sample's (each picture is used once; trained and held-out samples apart). Printed
are the mean of the differences in nats a token, paired by sample, and how many standard errors it is above zero.
"""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moexpand.conf.compose import from_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.data.stream import Encoded
from moexpand.train import checkpoints, preflight
from moexpand.train.run_data import open_data


@dataclass(frozen=True)
class Differences:
    """Loss with another's picture minus loss with its own, by sample."""

    of_samples: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.of_samples)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.of_samples) / math.sqrt(len(self.of_samples))

    def __str__(self) -> str:
        count, ratio = len(self.of_samples), self.mean / self.error
        return f"{self.mean:+.4f} +- {self.error:.4f} ({ratio:+5.1f} standard errors, {count} samples)"


def pictured(data: PackedData, held_out: bool) -> list[Encoded]:
    """The samples of the first source that have one picture, trained on or held out."""
    stream = data.streams[0]
    places = stream.train.tolist()
    if held_out:
        places = sorted({sample for pack in stream.held_out(1 << 30) for sample, _, _ in pack})
    made = [stream.encoded(sample) for sample in places]
    return [each for each in made if each is not None and len(each.grids) == 1]


def with_picture(sample: Encoded, other: Encoded, placeholder: int, merge: int) -> Any:
    """A micro-batch of one segment: the sample's text around the picture of `other`."""
    places = np.flatnonzero(sample.ids == placeholder)
    count = math.prod(other.grids[0]) // merge**2
    before, after = slice(0, int(places[0])), slice(int(places[-1]) + 1, None)
    ids = np.concatenate([sample.ids[before], np.full(count, placeholder, np.int32), sample.ids[after]]).astype(np.int64)
    trained = np.concatenate([sample.loss[before], np.zeros(count, bool), sample.loss[after]])
    return SimpleNamespace(
        tokens=ids,
        labels=np.roll(ids, -1),
        loss_mask=np.concatenate([trained[1:], [False]]).astype(np.float32),
        positions=np.arange(len(ids)),
        cu_seqlens=np.array([0, len(ids)], np.int32),
        patches=other.patches[0],
        grids=np.array(other.grids, np.int64),
    )


def differences(engine: Any, data: PackedData, samples: list[Encoded]) -> Differences:
    """Every sample with the picture of the one after it in a random order, against its own."""
    from moexpand.parallel import cpu
    from moexpand.parallel.batch import PackedBatch

    assert data.images is not None
    order = np.random.default_rng(0).permutation(len(samples))
    found = []
    for own, other in zip(order, np.roll(order, 1), strict=True):
        losses = []
        for picture in (samples[own], samples[other]):
            arrays = with_picture(samples[own], picture, data.image_token, data.images.merge_size)
            batch = PackedBatch.from_arrays(arrays, cpu.device(), engine.shape, data.pixel_table)
            losses.append(engine.evaluate([batch])[0])
        found.append(losses[1] - losses[0])
    return Differences(found)


def measure(run: Path) -> dict[str, Differences]:
    """The differences of a run's newest checkpoint, over the samples that it trained on and those that it never saw."""
    from moexpand.parallel import checkpoint, ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import Layout, RouterRules
    from moexpand.train.setup import shape_of

    config: TrainCommand = from_yaml(run / "config.yaml", "train")
    source, data = preflight.source_of(config), open_data(config)
    here = ranks.start(Layout())
    try:
        engine = Engine(shape_of(source.architecture), Layout(), RouterRules(), config.precision.name, here)
        checkpoint.load(engine, checkpoints.find(run))
        return {
            name: differences(engine, data, pictured(data, held_out))
            for name, held_out in (("trained on", False), ("held out", True))
        }
    finally:
        ranks.stop()


def main(runs: list[str]) -> None:
    """Print the differences of each run and of all together."""
    found = {run: measure(Path(run)) for run in runs}
    for name in ("trained on", "held out"):
        print(f"captions {name}: loss with another's picture minus with its own, nats a token")
        for run, measured in found.items():
            print(f"  {run}: {measured[name]}")
        if len(runs) > 1:
            means = [measured[name].mean for measured in found.values()]
            print(f"  over the {len(runs)} runs: {Differences(means)}".replace("samples", "runs"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python bench/captions.py RUN [RUN ...]")
    main(sys.argv[1:])
