"""Requests to stop, noticed between steps on all ranks alike."""

import signal
from types import FrameType

from moexpand.parallel import ranks


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and SIGINT; the second signal of a kind acts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        return ranks.any_rank(self.name is not None)
