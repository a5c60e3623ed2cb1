"""The command as a process of another host, which stops or kills itself at a moment that a test has chosen.

`python tests/upcycle/hosts.py SETTINGS WORDS...` runs `moexpand WORDS...`; SETTINGS are JSON. What makes it another host is what
claims know hosts by: the host's name, and its boot with its namespace of processes. Silence is shortened, so that a test need not
wait for a minute. Moments are events in the working folder, `os.rename writing/model-00002` for instance: what the interpreter
reports to its auditors, and `pwrite` and `fsync`, before it happens.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moexpand.base import claims
from moexpand.cli import main
from moexpand.upcycle import writer

ROOT = Path(__file__).resolve().parents[2]
SILENCE, REFRESH = 1.0, 0.1
"""Seconds, instead of `claims.PATIENCE` and `claims.REFRESH`."""

TIMEOUT = 120.0
WORKING = ".expanding/"
ENDED, STOPPED_THERE = "ended", "stopped"

Moment = tuple[str, int]
"""The n-th event that begins with these words."""


class QuickClaims(claims.Claims):
    """Claims whose holders are soon taken for dead."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SILENCE)

    @contextmanager
    def refreshed(self, every: float = REFRESH) -> Iterator[None]:
        """As in every process, but more often."""
        with super().refreshed(every):
            yield


def become(host: str) -> None:
    """Let this process be one of another host."""
    of_claims: Any = claims
    of_claims.process_space = lambda: f"boot of {host}"
    of_claims.socket.gethostname = lambda: host
    of_claims.REFRESH = REFRESH
    of_writer: Any = writer
    of_writer.Claims = QuickClaims


def interrupt_at(moment: Moment, number: int) -> None:
    """Send this process the signal `number` before an event."""
    words, left = moment[0], [moment[1]]

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        _, working, inside = f"{path}/".partition(WORKING)
        inside = re.sub(r"^work\.[0-9a-f]+/", "", inside)
        if working and f"{event} {inside}".startswith(words):
            left[0] -= 1
            if left[0] == 0:
                signal.pthread_kill(threading.get_ident(), number)  # at once: this thread does not go on to the event

    def reported(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(descriptor: int, *arguments: Any) -> Any:
            sys.audit(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return real(descriptor, *arguments)

        setattr(os, name, call)

    reported("pwrite")
    reported("fsync")
    sys.addaudithook(heard)


class Host:
    """A process that was started by `hosts`."""

    def __init__(self, name: str, words: list[str], moment: Moment | None, number: signal.Signals) -> None:
        settings = {"host": name, "moment": moment, "number": int(number)}
        command = [sys.executable, __file__, json.dumps(settings), *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def settle(self) -> str:
        """Wait until the process has stopped or ended, and say which."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                return STOPPED_THERE if found.si_code == os.CLD_STOPPED else ENDED
            time.sleep(0.005)
        raise TimeoutError(f"process {self.process.pid} neither stopped nor ended in {TIMEOUT} s")

    def go_on(self) -> None:
        """Continue a process that has stopped."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, what it printed, and what it said on standard error."""
        out, said = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, said


@contextmanager
def hosts() -> Iterator[Callable[..., Host]]:
    """Starts processes, and kills those that are left at the end."""
    started: list[Host] = []

    def start(name: str, *words: object, moment: Moment | None = None, number: signal.Signals = signal.SIGSTOP) -> Host:
        started.append(Host(name, [str(word) for word in words], moment, number))
        return started[-1]

    try:
        yield start
    finally:
        for host in started:
            if host.process.poll() is None:
                host.process.kill()
                host.process.communicate()


def run(settings: str, *words: str) -> int:
    """The program."""
    values = json.loads(settings)
    become(values["host"])
    if values["moment"] is not None:
        interrupt_at(values["moment"], values["number"])
    return main(list(words))


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
