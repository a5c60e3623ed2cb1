"""A run that is killed twenty times at random moments ends as the run that was not, bit for bit."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.train.faults import begin, digest, leftovers, short, train, trajectory

STEPS, KILLS = 1200, 20


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_twenty_random_kills_change_nothing(shards: Path, tmp_path: Path) -> None:
    """SIGKILL to a rank, to torchrun, to the command or to all of them, a random time after the start or in a phase of saving."""
    changes = {"train__steps": STEPS, "save__every": 10, "save__keep": 2}
    straight, run = tmp_path / "straight", tmp_path / "run"
    done = train(short(shards, straight, **changes), timeout=900)
    assert done.returncode == 0, done.stderr
    rng, kills, ends = random.Random(int(os.environ.get("CHAOS_SEED", "0"))), 0, []
    of_all = ["step", "save.half_file", "save.written"]
    of_rank_0 = ["save.begun", "save.manifest", "save.rename", "save.latest", "save.prune"]
    while kills < KILLS:
        how = rng.choice(["rank", "torchrun", "command", "all", "point"])
        point = rng.choice([f"{name}#{rank}" for name in of_all for rank in (0, 1)] + [f"{name}#0" for name in of_rank_0])
        failpoint = point.replace("#", f"@{rng.randint(1, 5)}#") + "=kill" if how == "point" else ""
        process = begin(short(shards, run, **changes), failpoint)
        if how != "point":
            _kill(process, run, how, rng)
        process.communicate(timeout=200)
        ends.append((how, failpoint, process.returncode))
        kills += process.returncode != 2
        assert process.returncode in (0, 2, 3, -signal.SIGKILL), ends  # 2: workers of a killed command still save
        assert process.returncode != 0, f"the run is too short for {KILLS} kills: {ends}"
    while (done := train(short(shards, run, **changes), timeout=900)).returncode == 2:
        time.sleep(1.0)
    assert done.returncode == 0, (done.stderr, ends)
    last = f"step_{STEPS:07d}"
    assert trajectory(run) == trajectory(straight), ends
    assert digest(run / "checkpoints" / last) == digest(straight / "checkpoints" / last)
    assert leftovers(run) == []


def _kill(process: subprocess.Popen[str], run: Path, how: str, rng: random.Random) -> None:
    """While it starts, one time in five, or within two seconds of its first new step."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0.5, 5.0))
    else:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 2.0))
    while process.poll() is None:
        victims = _victims(process, how, rng)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if victims:
            return
        time.sleep(0.02)  # it has not started them yet


def _victims(process: subprocess.Popen[str], how: str, rng: random.Random) -> list[psutil.Process]:
    with suppress(psutil.Error):
        command = psutil.Process(process.pid)
        tree = command.children(recursive=True)
        torchrun = [child for child in tree if "torch.distributed.run" in child.cmdline()]
        ranks = [child for child in tree if child not in torchrun and "moexpand.train" in child.cmdline()]
        chosen = {"rank": [rng.choice(ranks)] if ranks else [], "torchrun": torchrun[:1], "command": [command]}
        return chosen.get(how, [command, *tree])
    return []
