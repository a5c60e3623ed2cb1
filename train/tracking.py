"""W&B, which can fail or take its time without hurting the run: offline unless a key is there, one run under one identity."""

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moexpand.conf.train_schema import Track

INIT_SECONDS = 60
"""How long W&B may try to reach its server before it is off."""

FINISH_SECONDS = 30.0
"""How long the end of a run waits for W&B."""

WAITING_ROWS = 100_000
"""Rows that may wait for W&B; more are left out."""


TableOf = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Columns and rows."""


class Tracker:
    """A W&B run on rank 0, in a thread of its own. Every failure is told once, and tracking then stays off.

    Args:
        identity: the run's; a run that goes on is continued under it.
        config: what W&B shows as the run's configuration.
        tables: by name, columns and rows that are shown once.
        say: where lines for the reader go; called from the thread too.
    """

    def __init__(
        self,
        track: Track,
        run: Path,
        identity: str,
        config: dict[str, Any],
        say: Callable[[str], None],
        tables: Mapping[str, TableOf] | None = None,
    ) -> None:
        self._say, self._tables = say, tables or {}
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._left_out = 0
        if track.wandb == "off":
            return
        online = track.wandb == "online" and bool(os.environ.get("WANDB_API_KEY"))
        if track.wandb == "online" and not online:
            say("W&B: no WANDB_API_KEY is set, so the run is tracked offline.")
        settings = {
            "project": track.project,
            "name": track.name or run.name,
            "group": track.group,
            "id": identity,
            "resume": "allow",
            "dir": str(run),
            "mode": "online" if online else "offline",
            "config": config,
        }
        self._thread = threading.Thread(target=self._work, args=(settings,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over one row, which goes under its step."""
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._left_out += 1

    def finish(self) -> None:
        """Close the run, waiting a little for what W&B has not taken yet."""
        if self._thread is None:
            return
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._left_out += 1
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._say(f"W&B did not end within {FINISH_SECONDS:.0f} s and is left behind; metrics.jsonl has every row.")
        if self._left_out:
            self._say(f"W&B did not keep up: {self._left_out} rows are in metrics.jsonl alone.")

    def _work(self, settings: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(**settings, settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS))
            for name, (columns, rows) in self._tables.items():
                run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, commit=False)
            while (row := self._rows.get()) is not None:
                run.log(row, step=row["step"])
            folder = Path(run.dir).parent
            run.finish()
            if settings["mode"] == "offline":
                self._say(f"W&B: tracked offline; upload with: wandb sync {folder}")
        except BaseException as error:  # also what W&B raises to end the process
            self._say(f"W&B failed and is off for the rest of the run: {type(error).__name__}: {error}")
