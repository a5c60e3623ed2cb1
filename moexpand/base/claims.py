"""Who works on what, among processes of any number of hosts that share a folder: one small file a claim, no daemon.

A claim on NAME is the file NAME.0, created exclusively. Its holder touches it every few seconds. A claim is stale when its
process is known to be dead (on this host), or when nobody has touched it for a while by one's own clock; then whoever creates
NAME.1 exclusively holds it, and so on: the highest number counts. Creating a file exclusively is atomic, so one taker wins.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

PATIENCE = 60.0
"""Seconds without a touch after which the claim of another host is stale."""

REFRESH = 5.0
"""Seconds between touches; also how long a claim may say nothing, which it does for an instant after it was created."""


@dataclass(frozen=True)
class Holder:
    """The process behind a claim.

    Attributes:
        host: name of its host, for messages.
        space: what makes process numbers comparable: the host's boot and its namespace of processes.
        pid: process number.
        started: when the process started, in clock ticks since the boot, since numbers are used again.
        token: of this claim alone; part of the names of files that belong to it.
    """

    host: str
    space: str
    pid: int
    started: int
    token: str

    @property
    def dead(self) -> bool:
        """Whether the process is known to be gone; one of another host never is."""
        return self.here and _started(self.pid) != self.started

    @property
    def here(self) -> bool:
        """Whether it is a process of this host, so that one can see whether it lives."""
        return self.space == process_space()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claims:
    """Claims of this process in `folder`, which exists.

    Args:
        patience: seconds, see `PATIENCE`.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self.folder, self.patience = folder, patience
        self.held: dict[str, tuple[Path, Holder]] = {}
        self._seen: dict[str, tuple[int, float]] = {}

    def take(self, name: str) -> Holder | None:
        """Claim `name`; None when a live process holds it.

        Raises:
            OSError: the folder has gone, or cannot be written.
        """
        number, last = self._last(name)
        if last is not None and not self._stale(last):
            return None
        path = self.folder / f"{name}.{number}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        holder = Holder(socket.gethostname(), process_space(), os.getpid(), _started(os.getpid()) or 0, secrets.token_hex(4))
        try:
            os.write(descriptor, json.dumps(asdict(holder)).encode())
        finally:
            os.close(descriptor)
        self.held[name] = path, holder
        return holder

    def release(self, name: str) -> None:
        """Give up a claim of this process."""
        path, holder = self.held.pop(name)
        if _read(path) == holder:  # not one of the same name, in a folder that was begun anew
            path.unlink(missing_ok=True)

    def took_over(self, name: str) -> bool:
        """Whether a claim of this process replaced a stale one."""
        return self.held[name][0].suffix != ".0"

    def holds(self, name: str) -> bool:
        """Whether this process's claim still counts; another may have taken it for stale."""
        _, last = self._last(name)
        return last is not None and name in self.held and _read(last) == self.held[name][1]

    def live(self) -> dict[str, Holder]:
        """Claims that count, of any process, by name; a holder that cannot be read is left out."""
        names = {name.rpartition(".")[0] for name in os.listdir(self.folder)}
        found = {name: self._last(name)[1] for name in sorted(names)}
        return {
            name: holder
            for name, path in found.items()
            if path is not None and not self._stale(path) and (holder := _read(path)) is not None
        }

    @contextmanager
    def refreshed(self, every: float | None = None) -> Iterator[None]:
        """Touch the claims of this process while the body runs, and release what is left of them at its end."""
        done = threading.Event()

        def touch() -> None:
            while not done.wait(REFRESH if every is None else every):
                for path, _ in list(self.held.values()):
                    with suppress(OSError):  # taken over, or the folder has been published
                        os.utime(path)

        thread = threading.Thread(target=touch, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for name in list(self.held):
                with suppress(OSError):
                    self.release(name)

    def _last(self, name: str) -> tuple[int, Path | None]:
        """The next free number of a name, and the claim that counts."""
        numbers = [
            int(number) for prefix, _, number in (file.rpartition(".") for file in os.listdir(self.folder)) if prefix == name
        ]
        last = max(numbers, default=-1)
        return last + 1, self.folder / f"{name}.{last}" if numbers else None

    def _stale(self, path: Path) -> bool:
        holder = _read(path)
        if holder is not None and holder.here:
            return holder.dead
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False  # released a moment ago; the next look finds it free
        now = time.monotonic()
        before, since = self._seen.get(path.name, (None, now))
        if before != touched:
            since = now
        self._seen[path.name] = touched, since
        return now - since >= (self.patience if holder is not None else min(self.patience, REFRESH))


def _read(path: Path) -> Holder | None:
    """The holder that a claim names; None while it is being written or when it is damaged."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None when it is gone or has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def process_space() -> str:
    """See `Holder.space`."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"unknown {secrets.token_hex(8)}"
