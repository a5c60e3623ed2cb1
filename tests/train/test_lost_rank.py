"""A rank that dies or hangs while it dispatches tokens: the others stop with a sentence, in time, and leave nothing."""

import time
from pathlib import Path

import psutil
import pytest

from moexpand.launch.local import run_workers
from tests.parents import make_child, make_parent
from tests.train.conftest import from_checkpoint, settings

TIMEOUT = {"dies": 60.0, "hangs": 20.0}
"""Longest wait for a peer, also while ranks start, which a busy machine may let drift apart."""
LIMIT = {"dies": 30.0, "hangs": 20.0 + 35.0 + 15.0}
"""Seconds from the failure to the end. Who notices a closed connection does not wait for the timeout. A hanging peer is waited
for; then torchrun takes 30 s to give up on the stopped one, which does not hear SIGTERM."""

DISPATCHERS = ("alltoall", "allgather", "grouped_allgather")


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    return make_child(make_parent(folder / "parent", vocab=8448), folder / "child", placement="halves_bits")


@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_other_rank_stops_with_a_sentence(
    shards: Path, child: Path, tmp_path: Path, how: str, dispatcher: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = settings(
        shards,
        run,
        parallel__dispatcher=dispatcher,
        parallel__timeout_seconds=TIMEOUT[how],
        train__global_batch=2,
        watchdog__seconds=0,
        save__asynchronous="false",
        save__every=1,
        **from_checkpoint(child),
    )
    arguments = [how, str(tmp_path), *words[1:]]
    code = run_workers("tests.train.faulty_worker", arguments, 2, run / "launch.log", run, 5.0, timeout=300)
    took = time.time() - (tmp_path / "failed").stat().st_mtime
    assert code == 3
    sentence = capfd.readouterr().err
    fate = {"dies": "closed its connection", "hangs": "did not answer in time (parallel.timeout_seconds)"}[how]
    killed = "Rank 1 was killed by SIGKILL, as when memory runs out: " if how == "dies" else ""
    assert sentence == (
        f"moexpand: {killed}Rank 0 stopped at step 2 because a peer {fate}; find in the log which rank failed first and why, "
        "then start again (training goes on from the newest checkpoint).\n"
    )
    assert took < LIMIT[how]
    pids = [int(file.read_text()) for file in tmp_path.glob("pid.*")]
    assert len(pids) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_0000001", "latest"}
