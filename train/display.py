"""What rank 0 shows: plain lines everywhere, on a terminal a progress bar below them."""

import sys
import time
from typing import Any

from moexpand.train.summary import clock


class Display:
    """Prints lines; other ranks are silent.

    Args:
        main: this is rank 0.
        plain: no progress bar even on a terminal.
        start, steps: steps done and steps in all.
        label: what the bar shows.
    """

    def __init__(self, main: bool, plain: bool, start: int = 0, steps: int = 0, label: str = "training") -> None:
        self._main = main
        self._bar: Any = None
        self._steps = steps
        self._first: tuple[int, float] | None = None
        """The first step of this process and when it was done: steps take as long on average as those since then."""
        if main and not plain and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
            )
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(self, step: int, line: str, note: str) -> None:
        """Print a step's line with the time that is left, and move the bar."""
        left = self._left(step)
        self.say(line + left)
        self.advance(step, note + left)

    def advance(self, step: int, note: str) -> None:
        """Move the bar to a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=note)

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return ""
        first, began = self._first
        return f"  left {clock((now - began) / (step - first) * (self._steps - step))}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
