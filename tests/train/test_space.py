"""A disk that cannot take the checkpoints is told of before the first step; the size that is said is the size they have."""

import re
from pathlib import Path

import pytest

from moexpand.base.result import read_result
from moexpand.launch.local import run_workers
from tests.train.faults import short

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]


def _run(shards: Path, run: Path, free: int, **changes: object) -> int:
    words = [str(free), *short(shards, run, **changes)[1:]]
    return run_workers("tests.train.small_disk_worker", words, 2, run / "launch.log", run, 5.0, timeout=120, echo=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_room_for_one_checkpoint_ends_the_job_before_it_begins(shards: Path, tmp_path: Path, precision: str) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, 10**6, precision=precision) == 3
    result = read_result(run)
    assert result is not None
    said = re.match(r"A checkpoint takes (\d+) MB and .* has 1 MB free; make room", result.message)
    assert said, result.message
    assert not (run / "metrics.jsonl").read_text()

    assert _run(shards, run, 10**12, precision=precision, train__steps=2) == 0
    (folder,) = (run / "checkpoints").glob("step_*")
    true = sum(path.stat().st_size for path in folder.iterdir())
    assert int(said[1]) * 1e6 == pytest.approx(true, rel=0.05)


def test_too_little_room_for_all_of_them_is_a_warning(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, 20 * 10**6, train__steps=1) == 0
    log = (run / "launch.log").read_text()
    assert re.search(r"WARNING: there are to be 10 more checkpoints at a time \(save.keep\), each of \d+ MB", log)
