"""What a training worker does from its command line to its exit code."""

import os
from contextlib import closing, nullcontext
from pathlib import Path

from moexpand.base.errors import ENVIRONMENT, Stopped
from moexpand.base.result import write_result
from moexpand.base.run_lock import run_lock
from moexpand.conf.train_schema import TrainCommand
from moexpand.train import preflight
from moexpand.train.signals import StopRequest
from moexpand.train.worker import attempt, work


def train_worker(words: list[str], stop: StopRequest) -> int:
    """Compose, train, leave the result in the run folder; returns the process's exit code."""
    return work("train", words, lambda config: Path(config.run.dir), lambda config: run(config, stop))


def run(config: TrainCommand, stop: StopRequest) -> None:
    """Check, join the other workers, train, leave."""
    source, data = preflight.check(config, int(os.environ.get("WORLD_SIZE", "1")))
    from moexpand.parallel import ranks
    from moexpand.parallel.board import Board
    from moexpand.train.loop import train
    from moexpand.train.setup import layout_of
    from moexpand.train.watchdog import Watchdog

    with run_lock(Path(config.run.dir)) if os.environ.get("RANK", "0") == "0" else nullcontext():
        here = ranks.start(layout_of(config.parallel), config.parallel.timeout_seconds)
        run = Path(config.run.dir)

        def leave_result(why: str) -> None:
            write_result(run, ENVIRONMENT, why, attempt())

        board = Board(attempt())
        watchdog = Watchdog(run, here.world_rank, here.world_size, config.watchdog.seconds, board, leave_result)
        try:
            with closing(watchdog):
                train(config, source, data, here, stop, watchdog)
        except RuntimeError as error:
            error.add_note(watchdog.where)
            raise
        except Stopped:  # all ranks are here; after any other error the peers may not be
            ranks.stop()
            raise
        ranks.stop()
