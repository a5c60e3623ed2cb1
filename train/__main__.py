"""A training worker: `torchrun ... -m moexpand.train key=value ...`; its result goes to exit.json in the run folder."""

import os
import sys
from pathlib import Path

from moexpand.base.errors import Stopped
from moexpand.conf.schema import TrainCommand
from moexpand.train import preflight
from moexpand.train.worker import work


def run(config: TrainCommand) -> None:
    """Check, join the other workers, train, leave."""
    source, data = preflight.check(config, int(os.environ.get("WORLD_SIZE", "1")))
    from moexpand.parallel import ranks
    from moexpand.train.loop import train
    from moexpand.train.setup import layout_of
    from moexpand.train.signals import StopRequest

    stop = StopRequest()
    here = ranks.start(layout_of(config.parallel), config.parallel.timeout_seconds)
    try:
        train(config, source, data, here, stop)
    except Stopped:  # all ranks are here; after any other error the peers may not be
        ranks.stop()
        raise
    ranks.stop()


if __name__ == "__main__":
    sys.exit(work("train", sys.argv[1:], lambda config: Path(config.run.dir), run))
