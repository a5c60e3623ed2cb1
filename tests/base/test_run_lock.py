"""Two jobs never work in one run folder, whoever holds it and wherever."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moexpand.base import claims
from moexpand.base.errors import InputError
from moexpand.base.run_lock import FOLDER, refuse_running, run_lock

HOLD = """
import sys, time
from pathlib import Path
from moexpand.base import claims
from moexpand.base.run_lock import run_lock
host = sys.argv[2]
if host:
    claims.process_space = lambda: f"boot of {host}"
    claims.socket.gethostname = lambda: host
claims.REFRESH = 0.1
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def _hold(holders: list[subprocess.Popen[str]], run: Path, host: str = "") -> subprocess.Popen[str]:
    """Another process that holds the folder, on another host if one is named."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run), host], stdout=subprocess.PIPE, text=True)
    holders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_by_name_and_free_when_its_holder_dies(
    tmp_path: Path, holders: list[subprocess.Popen[str]]
) -> None:
    process = _hold(holders, tmp_path)
    for attempt in (lambda: refuse_running(tmp_path), run_lock(tmp_path).__enter__):
        began = time.monotonic()
        with pytest.raises(InputError, match=f"Another job works in {tmp_path}: process {process.pid} on "):
            attempt()
        assert time.monotonic() - began < 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    refuse_running(tmp_path)
    with run_lock(tmp_path):
        assert len(list((tmp_path / FOLDER).iterdir())) == 1
    with run_lock(tmp_path):
        pass
    assert not list((tmp_path / FOLDER).iterdir())


def test_a_holder_on_another_host_is_waited_for_until_it_is_known_to_be_gone(
    tmp_path: Path, holders: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "REFRESH", 0.1)
    monkeypatch.setattr("moexpand.base.run_lock.REFRESH", 0.1)
    process, said = _hold(holders, tmp_path, "elsewhere"), []
    with pytest.raises(InputError, match=f"process {process.pid} on elsewhere"):
        refuse_running(tmp_path, said.append, patience=1.5)
    assert len(said) == 1
    assert f"waiting up to 2 s to see whether process {process.pid} on elsewhere" in said[0]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with run_lock(tmp_path, said.append, patience=1.5):
        assert 1.0 < time.monotonic() - began < 5.0, "its silence has to last for a while"


def test_a_folder_that_nobody_ever_held_is_free(tmp_path: Path) -> None:
    refuse_running(tmp_path / "none")
    assert not (tmp_path / "none").exists()
