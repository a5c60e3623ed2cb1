"""Submits a run to SLURM, and knows whether its last job is still there."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import write_atomic

SCRIPT = "job.sbatch"
UNKNOWN = "unknown, since squeue does not answer"

JOB = "job.json"
"""In the run folder: the number of the job that was submitted last."""


def refuse_queued(run: Path) -> None:
    """Refuse a run whose last job waits or runs.

    Raises:
        InputError: SLURM still has it; the sentence names it.
    """
    job, state = queued(run)
    if state:
        raise InputError(f"Job {job} of {run} is {state}; wait for it, or cancel it with scancel {job}.")


def queued(run: Path) -> tuple[str, str]:
    """The run's last job and its state, such as `running`; an empty state when SLURM no longer has it, or there was none."""
    job = queued_job(run)
    return job, states([job])[job] if job else ""


def queued_job(run: Path) -> str:
    """The number of the job that was submitted last; empty where there was none."""
    try:
        return str(json.loads((run / JOB).read_text(encoding="utf-8"))["job"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each job, such as `running`; empty for those that SLURM has no more, UNKNOWN where it does not answer."""
    if not jobs:
        return {}
    words = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%A %T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return dict.fromkeys(jobs, "")
    if done.returncode and "Invalid job id" not in done.stderr:
        return dict.fromkeys(jobs, UNKNOWN)
    found = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    return {job: found.get(job, "").lower() for job in jobs}


def submit(run: Path, script: str) -> str:
    """Write the script into the run folder and submit it.

    Returns:
        The number of the job.

    Raises:
        EnvironmentFailure: sbatch is missing or refuses; the sentence is what it said.
    """
    write_atomic(run / SCRIPT, script)
    job = _said(["sbatch", "--parsable", str(run / SCRIPT)]).strip().partition(";")[0]
    write_atomic(run / JOB, json.dumps({"job": job}))
    return job


def _said(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EnvironmentFailure(
            f"There is no {words[0]} on this machine; submit from a login node of the cluster, or look at the script with "
            "launch.dry_run=true."
        ) from None
    if done.returncode:
        why = "; ".join(line.removeprefix("sbatch: error: ").rstrip(".") for line in done.stderr.strip().splitlines())
        raise EnvironmentFailure(f"{words[0]} refused the job: {why}.")
    return done.stdout
