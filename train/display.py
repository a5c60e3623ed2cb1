"""What rank 0 shows: plain lines everywhere, on a terminal a progress bar below them."""

import sys
from typing import Any


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
        if main and not plain and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
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

    def advance(self, step: int, note: str) -> None:
        """Move the bar to a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
