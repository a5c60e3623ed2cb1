"""Workers on this machine: their result comes back, signals reach them, and nothing outlives the launcher."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from moexpand.base.errors import EnvironmentFailure
from moexpand.base.result import read_result, write_result
from moexpand.launch.local import run_workers

ROOT = Path(__file__).resolve().parents[2]


def run(how: str, folder: Path, **options: object) -> int:
    arguments = {"grace_seconds": 20.0, "timeout": 60.0, **options}
    return run_workers("tests.launch.worker", [how, str(folder)], 2, folder / "launch.log", folder, **arguments)  # type: ignore[arg-type]


def signal_when_started(folder: Path, *numbers: signal.Signals) -> None:
    """Send signals to this process, one a second, once both workers have joined."""

    def send() -> None:
        while not all((folder / f"pid.{rank}").is_file() for rank in (0, 1)):
            time.sleep(0.05)
        for number in numbers:
            time.sleep(1)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def alive(folder: Path) -> list[int]:
    pids = [int(file.read_text()) for file in folder.glob("pid.*")]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_success_is_0_and_rank_0_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path, 3, "An older run failed.")
    assert run("ok", tmp_path) == 0
    out, err = capfd.readouterr()
    assert out == "rank 0: the sum is 3\n"
    assert err == ""
    assert "rank 1: the sum is 3" in (tmp_path / "launch.log").read_text()


def test_code_of_the_workers_comes_back_with_its_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("wrong", tmp_path, echo=False) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "moexpand: The worker ended with 2 after signals [].\n"
    assert "rank 0: the sum is 3" in (tmp_path / "launch.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_reaches_the_workers_and_75_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    signal_when_started(tmp_path, number)
    before = signal.getsignal(number)
    assert run("wait", tmp_path) == 75
    assert f"after signals [{number.value}]" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    assert not alive(tmp_path)


def test_killed_rank_ends_the_run_and_names_the_log(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match=r"The workers ended without leaving a result in .*exit\.json.*launch\.log"):
        run("crash", tmp_path)
    assert time.monotonic() - start < 45
    assert "SIGKILL" in (tmp_path / "launch.log").read_text()
    assert not alive(tmp_path)


def test_workers_that_do_not_stop_in_time_are_killed(tmp_path: Path) -> None:
    signal_when_started(tmp_path, signal.SIGTERM)
    with pytest.raises(EnvironmentFailure, match="did not stop in time after SIGTERM"):
        run("deaf", tmp_path, grace_seconds=1.0)
    assert not alive(tmp_path)


def test_second_signal_kills_at_once(tmp_path: Path) -> None:
    signal_when_started(tmp_path, signal.SIGTERM, signal.SIGINT)
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="a second signal came"):
        run("deaf", tmp_path, grace_seconds=300.0)
    assert time.monotonic() - start < 50
    assert not alive(tmp_path)


def test_time_limit_ends_workers_that_hang(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure, match="their time was up"):
        run("deaf", tmp_path, timeout=6.0)
    assert not alive(tmp_path)


def test_workers_find_the_package_from_any_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moexpand.launch.local import run_workers; folder = Path(sys.argv[1]); "
        "sys.exit(run_workers('tests.launch.worker', ['ok', str(folder)], 1, folder / 'launch.log', folder, 5.0, 60.0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "rank 0: the sum is 1\n")


def test_first_result_stays(tmp_path: Path) -> None:
    write_result(tmp_path, 2, "The reason.")
    write_result(tmp_path, 75, "What a peer said after it.")
    result = read_result(tmp_path)
    assert result is not None
    assert (result.code, result.message) == (2, "The reason.")


@pytest.mark.parametrize("content", ["", '{"code": 0', '{"code": 0}', "[]", "null"])
def test_result_that_was_not_finished_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "exit.json").write_text(content)
    assert read_result(tmp_path) is None
