"""What a training worker does from its command line to its exit code."""

import os
from pathlib import Path

from moexpand.base.errors import Stopped
from moexpand.conf.train_schema import TrainCommand
from moexpand.train import preflight
from moexpand.train.signals import StopRequest
from moexpand.train.worker import work


def train_worker(words: list[str], stop: StopRequest) -> int:
    """Compose, train, leave the result in the run folder; returns the process's exit code."""
    return work("train", words, lambda config: Path(config.run.dir), lambda config: run(config, stop))


def run(config: TrainCommand, stop: StopRequest) -> None:
    """Check, join the other workers, train, leave."""
    source, data = preflight.check(config, int(os.environ.get("WORLD_SIZE", "1")))
    from moexpand.parallel import ranks
    from moexpand.train.loop import train
    from moexpand.train.setup import layout_of

    here = ranks.start(layout_of(config.parallel), config.parallel.timeout_seconds)
    try:
        train(config, source, data, here, stop)
    except Stopped:  # all ranks are here; after any other error the peers may not be
        ranks.stop()
        raise
    ranks.stop()
