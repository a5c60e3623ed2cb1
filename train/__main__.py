"""A worker: `torchrun ... -m moexpand.train key=value ...`; its result goes to exit.json in the run folder."""

import os
import sys
import traceback
from pathlib import Path

from moexpand.base.errors import ENVIRONMENT, STOPPED, MoexpandError
from moexpand.base.result import write_result
from moexpand.conf.compose import compose_words
from moexpand.conf.schema import TrainCommand
from moexpand.train import preflight


def main(arguments: list[str]) -> int:
    """Run one worker; returns its exit code."""
    folder: Path | None = None
    try:
        config = compose_words("train", arguments)
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        run_worker(config)
        code, message = 0, ""
    except MoexpandError as error:
        code, message = error.exit_code, str(error)
        traceback.print_exc()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        code, message = ENVIRONMENT, f"A worker failed with {type(error).__name__}: {first}"
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    if folder is not None and (code or rank == 0):
        write_result(folder, code, message)
    # torchrun kills the peers of a worker that ends with an error; after a stop on request all end by themselves.
    return 0 if code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ else code


def run_worker(config: TrainCommand) -> None:
    """Check, join the other workers, train, leave."""
    source, data = preflight.check(config, int(os.environ.get("WORLD_SIZE", "1")))
    from moexpand.parallel import ranks
    from moexpand.train.loop import train
    from moexpand.train.setup import layout_of

    here = ranks.start(layout_of(config.parallel), config.parallel.timeout_seconds)
    try:
        train(config, source, data, here)
    finally:
        ranks.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
