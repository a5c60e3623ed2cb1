"""What rank 0 writes down of a run: metrics.jsonl, evaluations.jsonl, events.jsonl and W&B; other ranks write nothing.

None of it can stop the run: what cannot be written is told and waits, or is left out.
"""

import datetime
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moexpand.conf.train_schema import TrainCommand
from moexpand.train.checkpoints import Progress
from moexpand.train.expansion_table import COLUMNS, expansion_rows
from moexpand.train.tables import EVALUATIONS, EVENTS, METRICS, Table
from moexpand.train.tracking import Tracker
from moexpand.upcycle.plan import Plan


class Records:
    """Open tables and the tracker of a run that stands at `progress`."""

    def __init__(
        self, config: TrainCommand, progress: Progress, expansion: Plan | None, main: bool, say: Callable[[str], None]
    ) -> None:
        self._main, self._say = main, say
        if not main:
            return
        run = Path(config.run.dir)
        kept = progress.step if progress.step else -1  # a run that starts anew keeps nothing of an earlier attempt
        self._steps = Table(run / METRICS, kept, say)
        self._evaluations = Table(run / EVALUATIONS, kept, say)
        self._events = Table(run / EVENTS, sys.maxsize, say)
        self.held_out = {row["step"]: row["held_out_loss"] for row in self._evaluations.rows}
        """Held-out losses by step (on rank 0)."""
        tables = {} if expansion is None else {"expansion": (COLUMNS, expansion_rows(expansion))}
        shown = asdict(config) | {"made_by": progress.made_by}
        self._tracker = Tracker(config.track, run, progress.wandb_id, shown, say, tables)

    def step(self, row: dict[str, Any]) -> None:
        """Write down a step."""
        if self._main:
            self._steps.append(row)
            self._tracker.log(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write down an evaluation."""
        if self._main:
            self._evaluations.append(row)
            self.held_out[row["step"]] = row["held_out_loss"]
            self._tracker.log(row)

    def event(self, kind: str, step: int, text: str, warning: bool = False) -> None:
        """Write down and tell what happened: `started`, `saved`, `skipped`, `stopped`, `finished`, ..."""
        self._say(f"WARNING: {text}" if warning else text)
        if self._main:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self._events.append({"time": now, "step": step, "event": kind, "text": text})

    def lacks_evaluation(self, step: int) -> bool:
        """Whether no evaluation of this step is written down (rank 0 knows)."""
        return self._main and step not in self.held_out

    def close(self) -> None:
        if self._main:
            self._steps.close()
            self._evaluations.close()
            self._events.close()
            self._tracker.finish()
