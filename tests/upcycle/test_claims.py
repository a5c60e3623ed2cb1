"""A claim has one holder; that of a dead process is taken, that of a live one is not."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from moexpand.base.claims import Claims, Holder

TAKE = """
import sys
from pathlib import Path
from moexpand.base.claims import Claims
assert Claims(Path(sys.argv[1])).take("shard") is not None
print("taken", flush=True)
sys.stdin.read()
"""


def taker(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds a claim on `shard` until its standard input is closed."""
    command = [sys.executable, "-c", TAKE, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def foreign(folder: Path, name: str) -> Path:
    """A claim of a process on another host."""
    path = folder / name
    path.write_text(json.dumps(asdict(Holder("elsewhere", "another boot", os.getpid(), 1, "abcd"))))
    return path


def test_a_claim_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.take("a") is not None
    assert theirs.take("a") is None
    assert theirs.take("b") is not None
    ours.release("a")
    assert theirs.take("a") is not None
    assert theirs.holds("a")
    assert not theirs.took_over("a")


def test_the_claim_of_a_live_process_is_not_taken_and_that_of_a_dead_one_is(tmp_path: Path) -> None:
    process = taker(tmp_path)
    claims = Claims(tmp_path, patience=0.0)  # patience is for other hosts
    assert claims.take("shard") is None
    assert str(claims.live()["shard"]).startswith(f"process {process.pid} on ")
    process.kill()
    time.sleep(0.1)  # dead, and not waited for: still in the table of processes
    assert claims.live() == {}
    assert claims.take("shard") is not None
    assert claims.took_over("shard")
    process.communicate()


def test_a_process_number_that_was_used_again_is_not_the_holder(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    holder = claims.take("a")
    assert holder is not None
    record = asdict(holder) | {"started": holder.started - 1}
    (tmp_path / "a.0").write_text(json.dumps(record))
    assert Claims(tmp_path).take("a") is not None
    assert not claims.holds("a")


def test_the_claim_of_another_host_is_stale_when_nobody_touches_it(tmp_path: Path) -> None:
    path = foreign(tmp_path, "a.0")
    os.utime(path, (0, 0))  # its clock says nothing about ours
    claims = Claims(tmp_path, patience=0.3)
    began = time.monotonic()
    while claims.take("a") is None:
        if time.monotonic() - began < 0.6:  # a sign of life now and then
            os.utime(path)
        time.sleep(0.05)
    assert 0.8 < time.monotonic() - began < 5.0


def test_a_claim_that_cannot_be_read_is_given_time(tmp_path: Path) -> None:
    (tmp_path / "a.0").touch()
    claims = Claims(tmp_path, patience=0.2)
    assert claims.take("a") is None
    assert claims.live() == {}
    time.sleep(0.3)
    assert claims.take("a") is not None


def test_one_of_many_takers_wins_a_stale_claim(tmp_path: Path) -> None:
    for round in range(20):
        folder = tmp_path / str(round)
        folder.mkdir()
        dead = asdict(Holder("here", "x", 0, 0, "t"))
        own = Claims(folder).take("other")
        assert own is not None
        (folder / "a.0").write_text(json.dumps(dead | {"space": own.space, "pid": own.pid, "started": own.started - 1}))
        barrier, won = threading.Barrier(8), []

        def race(folder: Path = folder, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            claims = Claims(folder)
            barrier.wait()
            if claims.take("a") is not None:
                won.append(1)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [1]


def test_claims_are_touched_while_the_work_goes_on_and_released_at_its_end(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with claims.refreshed(every=0.05):
        claims.take("a")
        os.utime(tmp_path / "a.0", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "a.0").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "a.0").stat().st_mtime > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_has_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "gone").take("a")
