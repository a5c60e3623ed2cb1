"""Requests to stop. They are remembered from a worker's first moment on, before torch is imported, and noticed between steps
and between the batches of an evaluation, on all ranks alike."""

import signal
import time
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

ECHO_SECONDS = 10.0
"""Launchers and batch systems pass signals on, each to every process, so that one request arrives several times."""


class StopRequest:
    """Remembers the first signal that asks for a stop; another that comes more than ten seconds later acts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        for number in ASKING:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._first = signal.Signals(number).name, now
        elif now - self._first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.name is not None
