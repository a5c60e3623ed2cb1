"""What rank 0 writes down of a run: metrics.jsonl, evaluations.jsonl and W&B; other ranks write nothing."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moexpand.conf.schema import TrainCommand
from moexpand.train.checkpoints import Progress
from moexpand.train.metrics import EVALUATIONS, METRICS, Table
from moexpand.train.tracking import Tracker


class Records:
    """Open tables and the tracker of a run that stands at `progress`."""

    def __init__(self, config: TrainCommand, progress: Progress, main: bool, say: Callable[[str], None]) -> None:
        self._main = main
        if not main:
            return
        run = Path(config.run.dir)
        kept = progress.step if progress.step else -1  # a run that starts anew keeps nothing of an earlier attempt
        self._steps = Table(run / METRICS, kept)
        self._evaluations = Table(run / EVALUATIONS, kept)
        self._tracker = Tracker(config.track, run, progress.wandb_id, asdict(config), say)

    def step(self, row: dict[str, Any]) -> None:
        """Write down a step."""
        if self._main:
            self._steps.append(row)
            self._tracker.log(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write down an evaluation."""
        if self._main:
            self._evaluations.append(row)
            self._tracker.log(row)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether no evaluation of this step is written down (rank 0 knows)."""
        return self._main and step not in self._evaluations.steps

    def close(self) -> None:
        if self._main:
            self._steps.close()
            self._evaluations.close()
            self._tracker.finish()
