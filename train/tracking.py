"""W&B, which can fail without hurting the run: offline unless a key is there, one run under one identity."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moexpand.conf.train_schema import Track


class Tracker:
    """A W&B run on rank 0. Every failure is reported once and tracking then stays off."""

    def __init__(self, track: Track, run: Path, identity: str, config: dict[str, Any], say: Callable[[str], None]) -> None:
        self._run: Any = None
        self._say = say
        if track.wandb == "off":
            return
        online = track.wandb == "online" and bool(os.environ.get("WANDB_API_KEY"))
        if track.wandb == "online" and not online:
            say("W&B: no WANDB_API_KEY is set, so the run is tracked offline.")
        try:
            import wandb

            self._run = wandb.init(
                project=track.project,
                name=track.name or run.name,
                id=identity,
                resume="allow",
                dir=str(run),
                mode="online" if online else "offline",
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up(error)

    def log(self, row: dict[str, Any]) -> None:
        """Send one row under its step."""
        if self._run is None:
            return
        try:
            self._run.log(row, step=row["step"])
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Close the run and say how an offline one is uploaded."""
        if self._run is None:
            return
        try:
            offline, folder = self._run.settings.mode == "offline", self._run.dir
            self._run.finish()
            if offline:
                self._say(f"W&B: tracked offline; upload with: wandb sync {Path(folder).parent}")
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(f"W&B failed and is off for the rest of the run: {type(error).__name__}: {error}")
