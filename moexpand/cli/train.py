"""`moexpand train`: check everything, then start the workers on this machine, submit them to SLURM, or write their script."""

import shlex
import sys
from pathlib import Path

from moexpand.base.errors import DONE, InputError
from moexpand.base.files import disk_errors, write_atomic
from moexpand.base.result import remove_result
from moexpand.base.run_lock import refuse_running
from moexpand.conf.compose import to_yaml
from moexpand.conf.fields import changed
from moexpand.conf.train_schema import TrainCommand
from moexpand.launch.local import run_workers, stop_before_workers
from moexpand.launch.scripts import batch_script, torchrun_script
from moexpand.launch.slurm import refuse_queued, submit
from moexpand.launch.torchrun import LAUNCHED, WORKER, command_line, worker_arguments
from moexpand.train import preflight

BY_HAND = "torchrun.sh"


def run(config: TrainCommand) -> int:
    """Check, then start; returns the workers' code where they run on this machine."""
    stop_before_workers()
    for given in changed(config.sweep, "sweep"):
        raise InputError(f"{given} is for several runs; give --multirun as well, or leave it out.")
    check(config)
    if config.launch.dry_run:
        print(_sound(config))
        return DONE
    return start(config)


def check(config: TrainCommand) -> None:
    """Check everything that can be known to be wrong before a run starts."""
    preflight.check(config, config.launch.nodes * config.launch.processes)


def start(config: TrainCommand) -> int:
    """Start a run that was checked: here to its end, or handed over to SLURM or to the user."""
    folder = Path(config.run.dir)
    refuse_queued(folder)
    refuse_running(folder)
    with disk_errors(f"preparing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_result(folder)  # an older end is not this one's
    write_atomic(folder / LAUNCHED, to_yaml(config))
    return {"local": _here, "slurm": _submit, "torchrun": _write}[config.launch.name](config, folder)


def _sound(config: TrainCommand) -> str:
    """What a dry run says: that nothing is wrong, and what would run. The script goes alone to standard output."""
    folder, launch = Path(config.run.dir), config.launch
    if launch.name == "local":
        words = shlex.join(command_line(WORKER, worker_arguments(folder), launch.processes))
        return f"The configuration is sound; with it in {folder / LAUNCHED}, this would run:\n{words}"
    print(f"The configuration is sound; with it in {folder / LAUNCHED}, this script would start the run:", file=sys.stderr)
    return (batch_script if launch.name == "slurm" else torchrun_script)(launch, folder.absolute())


def _here(config: TrainCommand, folder: Path) -> int:
    """Run the workers on this machine to their end."""
    return run_workers(
        WORKER,
        worker_arguments(folder),
        config.launch.processes,
        log=folder / "launch.log",
        result=folder,
        grace_seconds=config.launch.grace_seconds,
    )


def _submit(config: TrainCommand, folder: Path) -> int:
    """Submit the run to SLURM, which starts it in its own time."""
    job = submit(folder.absolute(), batch_script(config.launch, folder.absolute()))
    print(f"Submitted as job {job}; its output goes to {folder / f'slurm-{job}.out'}.")
    print(f"scancel --batch --signal=USR1 {job} saves and puts it back into the queue, --full --signal=INT saves and ends it.")
    return DONE


def _write(config: TrainCommand, folder: Path) -> int:
    """Write the script that is started on each node by hand."""
    write_atomic(folder / BY_HAND, torchrun_script(config.launch, folder.absolute()))
    print(f"Start this on each of {config.launch.nodes} nodes, with NODE from 0 and any free PORT of the node with NODE=0:")
    print(f"bash {folder / BY_HAND} NODE HEAD:PORT")
    return DONE
