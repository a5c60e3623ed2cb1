"""`moexpand train`: check everything, then start torchrun on this machine and bring back the workers' result."""

import shlex
import signal
from pathlib import Path
from types import FrameType

from moexpand.base.errors import Stopped
from moexpand.base.files import disk_errors, write_atomic
from moexpand.base.run_lock import refuse_running
from moexpand.conf.compose import to_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.launch.local import command_line, run_workers
from moexpand.train import preflight

WORKER = "moexpand.train"
LAUNCHED = "launch.yaml"


def run(config: TrainCommand) -> int:
    """Run the workers and return their code."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, _stopped)
    preflight.check(config, config.launch.processes)
    folder = Path(config.run.dir)
    arguments = ["--config-dir", str(folder), "--config-name", LAUNCHED]
    if config.launch.dry_run:
        print(f"The configuration is sound; with it in {folder / LAUNCHED}, this would run:")
        print(shlex.join(command_line(WORKER, arguments, config.launch.processes)))
        return 0
    refuse_running(folder)
    with disk_errors(f"preparing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / LAUNCHED, to_yaml(config))
    return run_workers(
        WORKER,
        arguments,
        config.launch.processes,
        log=folder / "launch.log",
        result=folder,
        grace_seconds=config.launch.grace_seconds,
    )


def _stopped(number: int, frame: FrameType | None) -> None:
    """Before there are workers; `run_workers` then has handlers of its own."""
    raise Stopped(f"Stopped by {signal.Signals(number).name} before training began; nothing is lost, start again to go on.")
