"""`moexpand train`: check everything, then start torchrun on this machine and bring back the workers' result."""

import shlex
from pathlib import Path

from moexpand.base.files import disk_errors, write_atomic
from moexpand.conf.compose import to_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.launch.local import command_line, run_workers
from moexpand.train import preflight

WORKER = "moexpand.train"
LAUNCHED = "launch.yaml"


def run(config: TrainCommand) -> int:
    """Run the workers and return their code."""
    preflight.check(config, config.launch.processes)
    folder = Path(config.run.dir)
    arguments = ["--config-dir", str(folder), "--config-name", LAUNCHED]
    if config.launch.dry_run:
        print(f"The configuration is sound; with it in {folder / LAUNCHED}, this would run:")
        print(shlex.join(command_line(WORKER, arguments, config.launch.processes)))
        return 0
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
