"""Starts the workers of this machine through torchrun, passes signals on to them, and brings their result back.

torchrun turns every failure into exit code 1 and pages of text. So its text goes to a log, signals go to the workers alone
(launch/agent.py), and the workers leave their result in a file (base/result.py). A worker that fails exits with an error,
which makes torchrun stop its peers; workers that stopped on request all exit with 0. Nothing is ever restarted here.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from moexpand.base.errors import STOPPED, EnvironmentFailure, Stopped
from moexpand.base.files import disk_errors
from moexpand.base.result import FILE_NAME, read_result, remove_result
from moexpand.launch.agent import ENDS
from moexpand.launch.torchrun import ALONE, Node, command_line, environment

# What is passed on to the workers for each signal; a closed terminal asks for a stop like any other.
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
"""Of Linux's sys/prctl.h."""
SCAN_SECONDS = 1.0
RESULT_SECONDS = 10.0
"""How long the result of several nodes may take to be seen on all of them."""


def run_workers(
    module: str,
    arguments: list[str],
    processes: int,
    log: Path,
    result: Path,
    grace_seconds: float,
    timeout: float | None = None,
    echo: bool = True,
    node: Node = ALONE,
    echo_seconds: float = 0.0,
) -> int:
    """Run the workers of this machine to their end.

    Args:
        module: the workers' module.
        arguments: its arguments.
        processes: how many workers.
        log: file for torchrun's text, the workers' standard error, and the output of ranks 1 and up.
        result: folder into which the workers write their result (`write_result`); an older result there is removed (by the
            head, where there are several nodes).
        grace_seconds: how long workers may go on after a signal; then, or after a second signal, they are killed.
        timeout: seconds after which they are killed in any case; None waits for ever.
        echo: the output of rank 0 goes to our standard output; otherwise to the log.
        node: this machine's place among several.
        echo_seconds: signals that come so soon after the first are the same request: batch systems send it by several ways.

    Returns:
        The code of the workers' result, or that of a stop where a signal came before they could take it; a code other than 0
        comes with its sentence on standard error.

    Raises:
        EnvironmentFailure: the workers ended without a result; the sentence names the log.
    """
    with disk_errors(f"preparing {result}"):
        result.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        if not node.number:
            remove_result(result)
        before = _stamp(result)  # what lies there is an earlier start's, which the head may remove a little later
    with tempfile.TemporaryDirectory(prefix="moexpand-") as logs, open(log, "a", encoding="utf-8") as text:
        begin = text.seek(0, os.SEEK_END)
        torchrun = subprocess.Popen(
            command_line(module, arguments, processes, logs, node),
            stdin=subprocess.DEVNULL,
            stdout=None if echo else text,
            stderr=text,
            env=environment(processes),
            start_new_session=True,  # Ctrl-C reaches this process alone
            preexec_fn=_end_with_parent,
        )
        ending = _wait(torchrun, grace_seconds, timeout, echo_seconds)
        _append_outputs(Path(logs), text)
    outcome = read_result(result) if node is ALONE or _appears(result, before) else None
    if outcome is None and ending.startswith("were stopped"):
        print(f"moexpand: The workers {ending} before they began; nothing is lost, start again to go on.", file=sys.stderr)
        return STOPPED
    if outcome is None:
        raise EnvironmentFailure(
            f"The workers {ending} without leaving a result in {result / FILE_NAME}; what they said is in {log}."
        )
    if outcome.code:
        # A rank that hung was killed by us, or by torchrun.
        killed = _killed_rank(log, begin) if "closed its connection" in outcome.message else ""
        print(f"moexpand: {killed}{outcome.message}", file=sys.stderr, flush=True)
    return outcome.code


def stop_before_workers() -> None:
    """From now on a signal is a stop with code 75, until `run_workers` has handlers of its own."""

    def stopped(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"Stopped by {signal.Signals(number).name} before training began; nothing is lost, start again to go on.")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, stopped)


def _appears(result: Path, before: tuple[int, int] | None) -> bool:
    """Whether a result of this start comes: written on another node, a network's file system may show it a little later."""
    end = time.monotonic() + RESULT_SECONDS
    while _stamp(result) in (None, before):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _stamp(result: Path) -> tuple[int, int] | None:
    """What tells one result from the next."""
    try:
        found = (result / FILE_NAME).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _killed_rank(log: Path, begin: int) -> str:
    """Which rank the system killed, as the beginning of a sentence, where torchrun's last words tell of one."""
    with open(log, encoding="utf-8", errors="replace") as text:
        text.seek(begin)
        found = re.findall(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: -(\d+) ", text.read())
    for rank, number in found:
        if int(number) != signal.SIGTERM:  # which torchrun itself sends to what is left
            why = ", as when memory runs out" if int(number) == signal.SIGKILL else ""
            return f"Rank {rank} was killed by {signal.Signals(int(number)).name}{why}: "
    return ""


def _end_with_parent() -> None:
    """Have the kernel ask this process to stop when its parent dies, even by SIGKILL; run in torchrun's process at its start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ENDS)


def _wait(torchrun: subprocess.Popen[bytes], grace_seconds: float, timeout: float | None, echo_seconds: float) -> str:
    """Wait for the end, pass signals on, kill when time is up; returns how it ended, as the middle of a sentence."""
    start = time.monotonic()
    kill_at = float("inf") if timeout is None else start + timeout
    scan_at, told, ending = start, False, "ended"
    tree: set[psutil.Process] = set()
    try:
        with _recorded_signals(echo_seconds) as received:
            while torchrun.poll() is None:
                now = time.monotonic()
                if now >= scan_at:
                    # Processes whose parent has died can no longer be found from torchrun, so they are noted while it lives.
                    tree |= _descendants(torchrun.pid)
                    scan_at = now + SCAN_SECONDS
                if len(received) > 1 or now > kill_at:
                    ending = f"were killed after {now - start:.0f} s, because {_reason(received)},"
                    break
                if received and not ending.startswith("were stopped"):
                    ending = f"were stopped by {received[0].name}"
                    kill_at = min(kill_at, now + grace_seconds)
                if received and not told:
                    workers = _workers(torchrun.pid)  # none yet while torchrun starts
                    for worker in workers:
                        _send(worker, PASSED_ON[received[0]])
                    told = bool(workers)
                with suppress(subprocess.TimeoutExpired):
                    torchrun.wait(POLL_SECONDS)
    finally:
        _kill(torchrun, tree)
    return ending


def _reason(received: list[signal.Signals]) -> str:
    if not received:
        return "their time was up"
    return "a second signal came" if len(received) > 1 else f"they did not stop in time after {received[0].name}"


@contextmanager
def _recorded_signals(echo_seconds: float) -> Iterator[list[signal.Signals]]:
    """Collect the signals that ask for a stop instead of dying from them; the old handlers come back at the end."""
    received: list[signal.Signals] = []
    first = 0.0

    def record(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if received and now - first <= echo_seconds:
            return
        first = first or now
        received.append(signal.Signals(number))

    old = {number: signal.signal(number, record) for number in PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _workers(pid: int) -> list[psutil.Process]:
    """The children of torchrun that it started as ranks; it has helper processes besides."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with suppress(psutil.Error):
                if "LOCAL_RANK" in child.environ():
                    found.append(child)
    return found


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _kill(torchrun: subprocess.Popen[bytes], tree: set[psutil.Process]) -> None:
    """Kill what is left of the processes that we started, and wait until they are gone."""
    tree |= _descendants(torchrun.pid)
    if torchrun.poll() is None:
        torchrun.kill()
    for process in tree:
        _send(process, signal.SIGKILL)
    torchrun.wait()
    psutil.wait_procs(list(tree), timeout=10)


def _append_outputs(logs: Path, text: TextIO) -> None:
    """Copy what ranks 1 and up printed into the log."""
    for file in sorted(logs.rglob("stdout.log")):
        printed = file.read_text(encoding="utf-8", errors="replace")
        if printed:
            text.write(f"\n---- standard output of rank {file.parent.name}\n{printed}")
