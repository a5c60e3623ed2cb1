"""SLURM itself, one node on loopback: a run of two ranks is interrupted, preempted, cancelled, and comes to its end."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import ROOT, sentence
from tests.launch.slurm_cluster import cluster
from tests.train.conftest import settings, shards
from tests.train.faults import digest, rows, trajectory

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]
__all__ = ["shards"]

STEPS = 60
LAST = f"checkpoints/step_{STEPS:07d}"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running cluster."""
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "OMP_NUM_THREADS": "1"}


def words(shards: Path, run: Path, **changes: object) -> list[str]:
    given = {
        "launch": "slurm", "launch__gpus_per_node": 0, "launch__cpus_per_node": 2, "launch__time": 10,
        "launch__signal_seconds": 60, "train__steps": STEPS, "save__every": 1000, **changes,
    }  # fmt: skip
    return settings(shards, run, **given)


def command(environment: dict[str, str], *given: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "moexpand"] if given[0] == "train" else []
    return subprocess.run([*program, *given], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def submit(environment: dict[str, str], given: list[str]) -> str:
    done = command(environment, *given)
    assert done.returncode == 0, done.stderr
    found = re.match(r"Submitted as job (\d+); its output goes to ", done.stdout)
    assert found, done.stdout
    return found[1]


def state(environment: dict[str, str], job: str) -> str:
    found = re.search(r"JobState=(\w+)", command(environment, "scontrol", "show", "job", job).stdout)
    return found[1] if found else ""


def until(what: Callable[[], bool], output: Path, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, output.read_text() if output.exists() else "no output"
        time.sleep(0.1)


def steps(run: Path) -> int:
    try:
        return len(rows(run))
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def hurry(environment: dict[str, str], job: str) -> None:
    """SLURM keeps a job that comes back waiting for two minutes."""
    command(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without SLURM."""
    run = tmp_path_factory.mktemp("alone") / "run"
    given = settings(shards, run, train__steps=STEPS, save__every=1000)
    done = command({**os.environ, "OMP_NUM_THREADS": "1"}, *given)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_that_is_preempted_comes_back_and_ends_as_if_nothing_had_happened(
    slurm: dict[str, str], shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, words(shards, run))
    output = run / f"slurm-{job}.out"
    until(lambda: steps(run) >= 3, output)
    assert f"Job {job} of {run} is running" in sentence(command(slurm, *words(shards, run)), 2)

    urgent = command(slurm, "sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 3")
    assert urgent.returncode == 0, urgent.stderr
    until(lambda: "the job is back in the queue" in output.read_text(), output)
    until(lambda: state(slurm, job) == "PENDING", output)
    saved = steps(run)
    assert 3 <= saved < STEPS
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{saved:07d}"

    until(lambda: state(slurm, urgent.stdout.strip()) == "COMPLETED", output)
    hurry(slurm, job)
    until(lambda: state(slurm, job) == "COMPLETED", output)
    assert trajectory(run) == trajectory(undisturbed)
    assert digest(run / LAST) == digest(undisturbed / LAST)
    assert not (run / ".nodes").exists()


def test_the_signal_before_the_time_limit_saves_and_brings_the_job_back(
    slurm: dict[str, str], shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # A limit of two minutes with the signal 60 s before it.
    job = submit(slurm, words(shards, run, launch__time=2, train__steps=STEPS * 20))
    output = run / f"slurm-{job}.out"
    until(lambda: output.exists() and "the job received SIGUSR1" in output.read_text(), output, 150)
    until(lambda: state(slurm, job) == "PENDING", output)
    assert "saved; the job is back in the queue" in output.read_text()
    command(slurm, "scancel", job)


def test_a_cancelled_run_is_saved_and_does_not_come_back(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(slurm, words(shards, run, train__steps=STEPS * 20))
    output = run / f"slurm-{job}.out"
    until(lambda: steps(run) >= 3, output)
    command(slurm, "scancel", job)
    until(lambda: state(slurm, job) == "CANCELLED", output)
    until(lambda: "a checkpoint is saved" in output.read_text(), output)
    time.sleep(3)
    assert state(slurm, job) == "CANCELLED"


def test_a_rank_that_dies_is_started_again_in_the_same_job(
    slurm: dict[str, str], shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # At the thirtieth step of each start: the first has saved 20, the second 40, and the third is through before it.
    environment = {**slurm, "MOEXPAND_FAILPOINTS": "step@30#1=kill"}
    job = submit(environment, words(shards, run, save__every=20, save__keep=9))
    output = run / f"slurm-{job}.out"
    until(lambda: state(slurm, job) in ("COMPLETED", "FAILED"), output, 150)
    text = output.read_text()
    assert state(slurm, job) == "FAILED" or "start 1 failed with code 3; going on from the newest checkpoint" in text, text
    assert state(slurm, job) == "COMPLETED", text
    assert trajectory(run) == trajectory(undisturbed)


def test_a_run_folder_without_its_configuration_fails_as_often_as_it_may(
    slurm: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, words(shards, run, launch__setup="[rm -r $RUN/launch.yaml]"))
    output = run / f"slurm-{job}.out"
    until(lambda: state(slurm, job) == "FAILED", output)
    assert output.read_text().count("does not see") == 4


def test_what_sbatch_refuses_is_told(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    refused = command(slurm, *words(shards, tmp_path / "run", launch__partition="nowhere"))
    assert "sbatch refused the job: " in sentence(refused, 3)


def test_shellcheck_finds_nothing(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    slurms = ("gpus_per_node", "cpus_per_node", "time", "signal_seconds")
    for launch, changes in (("slurm", {}), ("torchrun", {f"launch__{name}": None for name in slurms})):
        done = command(slurm, *words(shards, tmp_path / "run", launch=launch, launch__dry_run="true", **changes))
        assert done.returncode == 0, done.stderr
        checked = subprocess.run(["shellcheck", "-"], input=done.stdout, capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_a_job_for_each_point(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    given = [
        *words(shards, folder, train__steps=4, launch__cpus_per_node=1, launch__processes=1, parallel__expert=1),
        "--multirun",
    ]
    first = command(slurm, *given, "optim.lr=1e-4,1e-3")
    assert first.returncode == 0, first.stderr
    jobs = re.findall(r"Submitted as job (\d+)", first.stdout)
    assert len(jobs) == 2
    again = command(slurm, *given, "optim.lr=1e-4,1e-3")
    assert again.returncode == 0, again.stderr
    assert [f"job {job} is" in again.stdout for job in jobs] == [True, True]
    for job in jobs:
        until(lambda job=job: state(slurm, job) == "COMPLETED", folder)  # type: ignore[misc]
    assert command(slurm, *given, "optim.lr=1e-4,1e-3").stdout.count("done before") == 2


def test_optuna_waits_for_the_jobs_that_it_proposed(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    given = words(shards, tmp_path / "search", train__steps=3, launch__cpus_per_node=1, launch__processes=1, parallel__expert=1)
    search = ["--multirun", "sweep=optuna", "sweep.metric=loss", "sweep.trials=3", "sweep.parallel=2"]
    done = command(slurm, *given, *search, "optim.lr=interval(1e-4,1e-2)")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^trial \d: loss \d", done.stdout, re.MULTILINE)) == 3, done.stdout
