"""The matrix of faults on two ranks: whatever happens, the same command goes on and ends with the weights of a run without it.

Faults are injected at named points of the real command (moexpand/base/failpoints.py); a few are the system's own.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import sentence
from tests.train.conftest import STEPS, STOP
from tests.train.faults import begin, checkpoints, digest, leftovers, rows, short, train, trajectory

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

LAST = f"step_{STEPS:07d}"
BEFORE = f"step_{STOP:07d}"


@pytest.fixture(scope="module")
def undisturbed(straight: Path) -> str:
    """The digest of the final weights and moments of a run that nothing happened to."""
    return digest(straight / "checkpoints" / LAST)


def _goes_on(words: list[str], run: Path, straight: Path, undisturbed: str) -> subprocess.CompletedProcess[str]:
    """The same command ends with the same figures and weights, to the last bit, and leaves no leftovers."""
    done = train(words)
    assert done.returncode == 0, done.stderr
    assert trajectory(run) == trajectory(straight)
    assert digest(run / "checkpoints" / LAST) == undisturbed
    assert leftovers(run) == []
    return done


# ------------------------------------------------------------ killed


@pytest.mark.parametrize(
    ("failpoint", "whole"),
    [
        ("step@8#1=kill", [BEFORE]),
        ("save.begun@2=kill", [BEFORE]),
        ("save.half_file@2#0=kill", [BEFORE]),
        ("save.half_file@2#1=kill", [BEFORE]),
        ("save.written@2#0=kill", [BEFORE]),
        ("save.manifest@2=kill", [BEFORE]),
        ("save.rename@2=kill", [BEFORE]),
        ("save.latest@2=kill", [BEFORE, "step_0000010"]),
        ("save.prune@2=kill", [BEFORE, "step_0000010"]),
    ],
)
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(
    shards: Path, straight: Path, undisturbed: str, tmp_path: Path, failpoint: str, whole: list[str]
) -> None:
    run = tmp_path / "run"
    words = short(shards, run)
    began = time.monotonic()
    said = sentence(train(words, failpoint), 3)
    assert time.monotonic() - began < 60
    rank = 1 if "#1" in failpoint else 0
    assert f"Rank {rank} was killed by SIGKILL, as when memory runs out: Rank {1 - rank} stopped at " in said
    assert "because a peer closed its connection" in said
    assert checkpoints(run) == whole or [name for name in checkpoints(run) if not name.startswith(".")] == whole
    _goes_on(words, run, straight, undisturbed)


def test_a_killed_launcher_takes_its_workers_along(shards: Path, straight: Path, undisturbed: str, tmp_path: Path) -> None:
    """Workers without a launcher save and end; until then nobody else gets the folder."""
    run = tmp_path / "run"
    words = short(shards, run)
    process = begin([*words, "train.steps=400"])
    _await_steps(run, 2, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(tree, timeout=45)
    assert alive == []
    assert len(gone) >= 3
    (saved,) = checkpoints(run)
    assert int(saved.removeprefix("step_")) >= 2
    words = short(shards, run, train__steps=max(STEPS, int(saved.removeprefix("step_"))))
    done = train(words)
    assert done.returncode == 0, done.stderr
    assert trajectory(run)[:STEPS] == trajectory(straight)


def _await_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline, metrics = time.monotonic() + 90, run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------ hanging


@pytest.mark.parametrize("failpoint", ["step@8#1=stop", "step@8#0=stop", "evaluate@7#1=stop"])
def test_a_hanging_rank_is_named_and_killed_and_the_others_leave_their_stacks(
    shards: Path, straight: Path, undisturbed: str, tmp_path: Path, failpoint: str
) -> None:
    run, seconds = tmp_path / "run", 8.0
    words = short(shards, run, watchdog__seconds=seconds, evaluate__every=4)
    process = begin(words, failpoint)
    _await_steps(run, 4, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    stopped_at = time.monotonic()
    out, err = process.communicate(timeout=90)
    took = time.monotonic() - stopped_at
    said = sentence(subprocess.CompletedProcess(process.args, process.returncode, out, err), 3)
    rank = int(failpoint.partition("#")[2][0])
    assert f"rank {rank} (process " in said
    assert "has stopped answering" in said
    assert took < 3 * seconds + 10
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    stacks = (run / "stacks" / f"rank_{1 - rank:05d}.txt").read_text()
    assert "Stacks of rank" in stacks
    assert "train/loop.py" in stacks
    _goes_on(short(shards, run), run, straight, undisturbed)


# ------------------------------------------------------------ signals


SIGNALLED = {
    "before the first step": ("step=term", 0),
    "one rank": ("step@4#1=term", None),
    "all ranks": ("step@4=term", None),
    "while evaluating": ("evaluate@6=term", 4),
    "while saving": ("save.half_file@1=term", None),
    "as a save is published": ("save.manifest@1=term", None),
}


@pytest.mark.parametrize("when", list(SIGNALLED))
def test_a_signal_in_any_phase_saves_once_and_exits_with_75(
    shards: Path, straight: Path, undisturbed: str, tmp_path: Path, when: str
) -> None:
    failpoint, step = SIGNALLED[when]
    run = tmp_path / "run"
    words = short(shards, run, evaluate__every=4)
    done = train(words, failpoint)
    said = sentence(done, 75)
    assert "a checkpoint is saved, start again to go on" in said
    names = checkpoints(run)
    assert done.stdout.count("saved ") == len(names), "each once"
    last = int(names[-1].removeprefix("step_"))
    assert f"after step {last} of {STEPS}" in said
    assert last < STEPS
    if step is not None:
        assert last in (step, step + 1)
    assert [row["event"] for row in rows(run, "events.jsonl")][-1] == "stopped"
    _goes_on(short(shards, run), run, straight, undisturbed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_the_command_reaches_the_workers(shards: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    process = begin(short(shards, run, train__steps=400, save__every=0))
    _await_steps(run, 2, process)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert "start again" in sentence(subprocess.CompletedProcess(process.args, process.returncode, out, err), 75)
    assert len(checkpoints(run)) == 1


def test_a_second_signal_does_not_wait(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin(short(shards, run, train__steps=400), "save.half_file#1=stop")
    _await_steps(run, 5, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "a second signal came" in err
    assert time.monotonic() - began < 10
    assert psutil.wait_procs(tree, timeout=5)[1] == []


# ------------------------------------------------------------ the disk


@pytest.mark.parametrize("failpoint", ["save.begun@2=full", "save.half_file@2#1=full", "save.manifest@2=broken"])
def test_a_save_that_fails_leaves_the_checkpoints_that_there_are(
    shards: Path, straight: Path, undisturbed: str, tmp_path: Path, failpoint: str
) -> None:
    """It stops the run with a sentence, or is told of, as asked for; nothing is published half."""
    what = "The disk is full while writing" if failpoint.endswith("full") else "Input/output error while writing"
    run = tmp_path / "stops"
    words = short(shards, run)
    assert what in sentence(train(words, failpoint), 3)
    assert checkpoints(run) == [BEFORE]
    _goes_on(words, run, straight, undisturbed)
    run = tmp_path / "continues"
    done = train(short(shards, run, save__on_failure="continue"), failpoint)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert what in warning
    assert checkpoints(run) == [BEFORE, LAST]
    assert digest(run / "checkpoints" / LAST) == undisturbed


def test_a_full_disk_for_logs_does_not_stop_a_run(shards: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(short(shards, run), ",".join(f"table.append@{hit}#0=full" for hit in (2, 3, 4, 7)))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert 1 <= len(warnings) <= 2
    assert all("disk is full" in warning for warning in warnings)
    assert trajectory(run) == trajectory(straight), "what waited has followed"


@pytest.mark.parametrize("track", ["unreachable", "full"])
def test_wandb_that_cannot_work_does_not_stop_a_run(
    shards: Path, straight: Path, tmp_path: Path, track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mode = tmp_path / "run", "online" if track == "unreachable" else "offline"
    if track == "unreachable":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        done = train(short(shards, run, track__wandb=mode), timeout=200)
    else:
        assert os.geteuid() == 0, "a file system can be mounted by root alone"
        (run / "wandb").mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(run / "wandb")], check=True)
        try:
            done = train(short(shards, run, track__wandb=mode), timeout=200)
        finally:
            subprocess.run(["umount", "-l", str(run / "wandb")], check=True)
    assert done.returncode == 0, done.stderr
    assert trajectory(run) == trajectory(straight)


# ------------------------------------------------------------ two jobs, changed shards


def test_two_jobs_do_not_share_a_run_folder(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin(short(shards, run, train__steps=400))
    _await_steps(run, 2, process)
    before = (run / "launch.yaml").read_bytes()
    said = sentence(train(short(shards, run)), 2)
    assert f"Another job works in {run}: process " in said
    assert (run / "launch.yaml").read_bytes() == before
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
