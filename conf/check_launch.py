"""Rules between the keys of `launch`; one sentence each."""

import re

from moexpand.base.errors import InputError
from moexpand.conf.fields import changed
from moexpand.conf.launch_schema import Launch

LOCAL = ("name", "processes", "grace_seconds", "dry_run")
"""What a start on this machine reads."""

OF_SLURM = (
    "job_name",
    "partition",
    "account",
    "time",
    "gpus_per_node",
    "cpus_per_node",
    "signal_seconds",
    "restarts",
    "options",
)
"""What a job of SLURM alone reads."""


def check_launch(launch: Launch) -> None:
    """Check how a run shall start.

    Raises:
        InputError: a key that this way of starting does not read, or values that cannot go together.
    """
    _refuse_unread(launch)
    if launch.name == "slurm":
        limit = time_limit(launch.time)
        if limit < launch.signal_seconds + 60:
            raise InputError(
                f"launch.time={launch.time} is {limit} s and a job stops launch.signal_seconds={launch.signal_seconds} before "
                "its end, so it would get nowhere; give a longer time."
            )
        if launch.signal_seconds < launch.grace_seconds:
            raise InputError(
                f"launch.signal_seconds={launch.signal_seconds} before its limit a job has to save, for which "
                f"launch.grace_seconds={launch.grace_seconds:g} are given; give launch.signal_seconds at least as much."
            )
        for option in launch.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option):
                raise InputError(f"launch.options holds {option}, which is not an option such as --constraint=h100.")
            if (name := option[2:].partition("=")[0]) in OWN:
                raise InputError(f"launch.options holds {option}, which the script sets itself; give {OWN[name]}.")
    if launch.mounts and launch.container is None:
        raise InputError(f"launch.mounts=[{','.join(launch.mounts)}] belong to a container; give launch.container=IMAGE.")
    if launch.container is None and launch.container_runtime != Launch.container_runtime:
        raise InputError(
            f"launch.container_runtime={launch.container_runtime} runs a container; give launch.container=IMAGE as well."
        )
    if launch.name == "torchrun" and launch.container and launch.container_runtime == "pyxis":
        raise InputError("launch.container_runtime=pyxis is a plugin of SLURM; give launch.container_runtime=apptainer.")


def time_limit(text: str) -> int:
    """Seconds of a time of SLURM: minutes, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        InputError: another form. MM:SS is SLURM's as well and is too easily taken for hours; 3600 minutes and more are what YAML
            makes of hours that have no quotes.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?", text)
    days, first, second, third = found.groups() if found else (None, None, None, None)
    if first is None or (days is None and second is not None and third is None):
        raise InputError(f"launch.time={text} is not minutes, HH:MM:SS, D-HH or D-HH:MM:SS; give one of these, as in 24:00:00.")
    if days is None and second is None:
        if int(first) >= 3600:
            raise InputError(f"launch.time={text} is {int(first):,} minutes; give HH:MM:SS or D-HH, in YAML between quotes.")
        return 60 * int(first)
    return 86_400 * int(days or 0) + 3600 * int(first) + 60 * int(second or 0) + int(third or 0)


OWN = {
    "nodes": "launch.nodes",
    "ntasks": "launch.nodes and launch.processes",
    "ntasks-per-node": "launch.processes",
    "job-name": "launch.job_name",
    "partition": "launch.partition",
    "account": "launch.account",
    "time": "launch.time",
    "signal": "launch.signal_seconds",
    "gpus-per-node": "launch.gpus_per_node",
    "cpus-per-task": "launch.cpus_per_node",
    "exclusive": "launch.cpus_per_node=0",
    "output": "run.dir",
    "open-mode": "run.dir",
    "requeue": "launch.restarts",
}
"""Options of sbatch that are in every script, with the key that sets them."""


def _refuse_unread(launch: Launch) -> None:
    """Name the first key that would change nothing."""
    for given in changed(launch, "launch"):
        key = given.partition("=")[0].removeprefix("launch.")
        if launch.name == "local" and key not in LOCAL:
            raise InputError(f"{given} changes nothing on this machine alone; give launch=slurm or launch=torchrun.")
        if launch.name == "torchrun" and key in OF_SLURM:
            raise InputError(f"{given} belongs to launch=slurm; leave it out, or give launch=slurm.")
