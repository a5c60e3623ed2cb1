"""A run on two nodes, both of them this machine: started by hand as `launch=torchrun` says, with one worker each."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, moexpand, sentence
from tests.train.conftest import STEPS
from tests.train.faults import FAILPOINTS, digest, rows, short, trajectory

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def by_hand(run: Path, failpoints: str = "") -> list[subprocess.Popen[str]]:
    """Start the script on both nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({FAILPOINTS: failpoints} if failpoints else {})}
    return [
        subprocess.Popen(
            ["bash", run / "torchrun.sh", str(number), head], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in (0, 1)
    ]  # fmt: skip


def ended(nodes: list[subprocess.Popen[str]], timeout: float = 120.0) -> list[tuple[int, str, str]]:
    try:
        said = [node.communicate(timeout=timeout) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()
    return [(node.returncode, out, err) for node, (out, err) in zip(nodes, said, strict=True)]


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Iterator[Path]:
    """A run folder with the script in it."""
    folder = tmp_path / "run"
    done = moexpand(*short(shards, folder, launch="torchrun", launch__nodes=2, launch__processes=1))
    assert done.returncode == 0, done.stderr
    assert f"bash {folder / 'torchrun.sh'} NODE HEAD:PORT" in done.stdout
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        assert str(folder) not in " ".join(process.info["cmdline"] or []), "a process outlived its launcher"


def test_two_nodes_make_the_run_of_one(run: Path, straight: Path) -> None:
    (code, out, err), (other, silent, _) = ended(by_hand(run))
    assert (code, other) == (0, 0), err
    assert f"all {STEPS} steps are done" in out
    assert silent == ""
    assert trajectory(run) == trajectory(straight)
    last = f"checkpoints/step_{STEPS:07d}"
    assert digest(run / last) == digest(straight / last)


def test_a_signal_on_one_node_stops_both_saved(run: Path, straight: Path) -> None:
    nodes = by_hand(run)
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 2:
        assert time.monotonic() < end, [node.poll() for node in nodes]
        time.sleep(0.05)
    nodes[1].send_signal(signal.SIGUSR1)
    (code, out, err), (other, _, _) = ended(nodes)
    assert (code, other) == (75, 75), err
    assert "a checkpoint is saved" in out
    assert [code for code, _, _ in ended(by_hand(run))] == [0, 0]
    assert trajectory(run) == trajectory(straight)


def test_a_killed_rank_of_one_node_ends_both(run: Path) -> None:
    nodes = ended(by_hand(run, "step@8#1=kill"))
    assert [code for code, _, _ in nodes] == [3, 3]
    assert "Rank 1 was killed by SIGKILL" in nodes[1][2]


def test_keys_of_several_nodes_are_refused_on_this_machine(shards: Path, tmp_path: Path) -> None:
    refused = moexpand(*short(shards, tmp_path / "run", launch__nodes=2))
    assert "launch.nodes=2 changes nothing on this machine alone" in sentence(refused, 2)
    assert not (tmp_path / "run").exists()
