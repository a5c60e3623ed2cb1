"""How fast bytes flow: counts from many threads, tells now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


class Meter:
    """Called with numbers of bytes as they are done; `found` with bytes that were there already, which say nothing about speed.

    Args:
        label: first words of each line.
        total: bytes in all.
        say: takes a line.
        every: seconds between lines.
    """

    def __init__(self, label: str, total: int, say: Callable[[str], None], every: float = 5.0) -> None:
        self.label, self.total, self.say, self.every = label, total, say, every
        self.done = self.there = 0
        self.begin = self.told = time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            self._tell()

    def found(self, amount: int) -> None:
        """Count bytes that someone else, or an earlier run, has done."""
        with self.lock:
            self.there += amount
            self._tell()

    def state(self) -> str:
        """How far, how fast, how long still."""
        speed = self.done / max(time.monotonic() - self.begin, 1e-9)
        far = f"{(self.done + self.there) / 1e9:,.1f} of {self.total / 1e9:,.1f} GB"
        if not self.done:
            return far
        left = max(0.0, self.total - self.done - self.there) / speed
        return f"{far}, {speed / 1e6:,.0f} MB/s, {duration(left)} left"

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self.told >= self.every:
            self.told = now
            self.say(f"{self.label}: {self.state()}")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def metered(label: str, total: int, plain: bool = False, stream: TextIO | None = None) -> Iterator[Meter]:
    """A `Meter` that shows a progress bar on a terminal and a line every few seconds elsewhere.

    Args:
        total: bytes in all.
        plain: lines even on a terminal.
        stream: where to; standard output when not given.
    """
    stream = stream or sys.stdout
    if plain or not stream.isatty():
        yield Meter(label, total, lambda line: print(line, file=stream, flush=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(label, total=total, state="")
        meter = Meter(label, total, lambda line: None, every=0.1)
        meter.say = lambda line: bar.update(task, completed=meter.done + meter.there, state=meter.state())
        yield meter
        meter.say("")
