"""How fast bytes flow: counts from many threads, tells now and then."""

import threading
import time
from collections.abc import Callable


class Meter:
    """Called with numbers of bytes, says how far and how fast it goes, at most once in `every` seconds.

    Args:
        label: first words of each line.
        total: bytes in all.
        say: takes a line.
        every: seconds between lines.
    """

    def __init__(self, label: str, total: int, say: Callable[[str], None], every: float = 5.0) -> None:
        self.label, self.total, self.say, self.every = label, total, say, every
        self.done = 0
        self.begin = self.told = time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, amount: int) -> None:
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now - self.told < self.every:
                return
            self.told = now
            speed = self.done / (now - self.begin)
            left = (self.total - self.done) / speed if speed else 0.0
            self.say(
                f"{self.label}: {self.done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB, {speed / 1e6:,.0f} MB/s, {left:,.0f} s left"
            )
