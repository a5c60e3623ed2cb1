"""Saves a run's checkpoints while it goes on, and removes those that are no longer wanted.

A checkpoint is written under a temporary name, listed with checksums, made durable and published by one rename; `latest` moves
last. All ranks call everything here together, between steps.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from moexpand.base.errors import CheckFailed, EnvironmentFailure
from moexpand.base.failpoints import failpoint
from moexpand.base.files import PARTIAL, Fact, disk_errors, fact_of, fsync_folder, write_atomic, write_json
from moexpand.conf.train_schema import Save
from moexpand.parallel import checkpoint, ranks
from moexpand.parallel.engine import Engine
from moexpand.train.checkpoints import FOLDER, LATEST, MANIFEST, NAME, TRAINER, Progress, list_steps
from moexpand.train.records import Records

CONFIG = "config.yaml"


class Saver:
    """The checkpoints of one run.

    Args:
        config: the resolved configuration as YAML, kept with every checkpoint.
        step: of the checkpoint that the run goes on from; 0 when there is none.
        records: knows the held-out losses, and is told what becomes of the checkpoints.
    """

    def __init__(self, engine: Engine, run: Path, settings: Save, config: str, step: int, records: Records) -> None:
        self._engine, self._run, self._settings, self._config, self._records = engine, run, settings, config, records
        self._writer = checkpoint.Writer(engine)
        self._building: Path | None = None
        self._progress: Progress | None = None
        self.newest: int | None = step or None
        """Step of the newest checkpoint, published or begun."""

    def check_space(self) -> list[str]:
        """Look whether the disk can take the checkpoints that are to come; returns a line for the user where it cannot take all.

        Raises:
            EnvironmentFailure: on all ranks, there is no room for a single one.
        """
        size = checkpoint.nbytes(self._engine)
        free = ranks.broadcast(shutil.disk_usage(self._run).free if self._engine.ranks.main else 0)
        if free < size:
            raise EnvironmentFailure(
                f"A checkpoint takes {size / 1e6:,.0f} MB and {self._run} has {free / 1e6:,.0f} MB free; make room, or choose "
                "another run.dir."
            )
        # A new one is written before an old one is removed.
        more = self._settings.keep + self._settings.keep_best + 1 - len(list_steps(self._run))
        if not self._settings.every or free >= more * size:
            return []
        return [
            f"WARNING: there are to be {more} more checkpoints at a time (save.keep), each of {size / 1e6:,.0f} MB, and "
            f"{self._run} has {free / 1e6:,.0f} MB free."
        ]

    @property
    def writing(self) -> bool:
        """Whether this rank still writes in the background."""
        return self._writer.writing

    def save(self, progress: Progress, wait: bool) -> None:
        """Begin to save; with `wait`, or without `save.asynchronous`, the checkpoint is published on return.

        Raises:
            CheckFailed: on all ranks, a weight is not finite; nothing is written.
            EnvironmentFailure: on all ranks, the checkpoint could not be written.
        """
        self.settle()
        if not self._engine.is_finite():
            raise CheckFailed(
                f"A weight is not finite after step {progress.step}, so no checkpoint is saved; the newest one in "
                f"{self._run / FOLDER} is from before. Look for the first bad step in metrics.jsonl."
            )
        background = self._settings.asynchronous and not wait
        try:
            self._begin(progress, background)
            if not background:
                self._complete()
        except EnvironmentFailure as error:
            self._give_up(error, fatal=wait)

    def poll(self, anyone_writes: bool) -> None:
        """Publish the checkpoint that was begun once no rank writes any more."""
        if self._building is not None and not anyone_writes:
            self.settle()

    def settle(self, fatal: bool = False) -> None:
        """Wait for the checkpoint that was begun, if there is one, and publish it."""
        if self._building is None:
            return
        try:
            self._complete()
        except EnvironmentFailure as error:
            self._give_up(error, fatal)

    def _begin(self, progress: Progress, background: bool) -> None:
        final = self._run / FOLDER / NAME.format(progress.step)
        building = self._building = final.with_name(f".{final.name}{PARTIAL}")

        def prepare() -> None:
            building.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            failpoint("save.begun")

        self._on_main(f"writing {final}", prepare)
        self.newest, self._progress = progress.step, progress
        self._writer.start(building, {"step": progress.step}, background)

    def _complete(self) -> None:
        building = self._building
        assert building is not None
        final = building.with_name(building.name.removeprefix(".").removesuffix(PARTIAL))
        facts = {name: fact for part in ranks.gather(self._writer.finish()) for name, fact in part.items()}
        failpoint("save.written")
        self._on_main(f"writing {final}", lambda: self._publish(building, final, facts))
        self._building = None
        self._event("saved", f"saved {final}")

    def _publish(self, building: Path, final: Path, facts: dict[str, Fact]) -> None:
        assert self._progress is not None
        write_json(building / TRAINER, asdict(self._progress))
        write_atomic(building / CONFIG, self._config)
        for path in building.iterdir():
            if path.name not in facts:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                facts[path.name] = fact_of(path)
        failpoint("save.manifest")
        write_json(building / MANIFEST, {name: asdict(fact) for name, fact in sorted(facts.items())})
        fsync_folder(building)
        failpoint("save.rename")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(building, final)
        fsync_folder(final.parent)
        failpoint("save.latest")
        write_atomic(final.parent / LATEST, final.name + "\n")
        failpoint("save.prune")
        for step in superfluous(list_steps(self._run), self._settings, self._records.held_out):
            shutil.rmtree(self._run / FOLDER / NAME.format(step))

    def _give_up(self, error: EnvironmentFailure, fatal: bool) -> None:
        """Remove what was begun; go on without it where the run may."""
        building, self._building, self.newest = self._building, None, None
        if building is not None and self._engine.ranks.main:
            shutil.rmtree(building, ignore_errors=True)
        if fatal or self._settings.on_failure == "stop":
            raise error
        told = f"{error} Training goes on with the checkpoints that there are (save.on_failure=continue)."
        self._event("save failed", told, warning=True)

    def _event(self, kind: str, text: str, warning: bool = False) -> None:
        assert self._progress is not None
        self._records.event(kind, self._progress.step, text, warning)

    def _on_main(self, action: str, work: Callable[[], None]) -> None:
        """Do something on rank 0; where it fails there, all ranks raise its error."""
        failure = ""
        if self._engine.ranks.main:
            try:
                with disk_errors(action):
                    work()
            except EnvironmentFailure as error:
                failure = str(error)
        failure = ranks.broadcast(failure)
        if failure:
            raise EnvironmentFailure(failure)


def superfluous(steps: list[int], settings: Save, held_out: dict[int, float]) -> list[int]:
    """Which of the checkpoints `steps` (ascending) are to be removed.

    The last `keep` stay, those of every `keep_every` steps, and the `keep_best` with the lowest held-out loss.
    """
    kept = set(steps[-settings.keep :])
    if settings.keep_every:
        kept |= {step for step in steps if step % settings.keep_every == 0}
    measured = sorted((held_out[step], step) for step in steps if step in held_out)
    kept |= {step for _, step in measured[: settings.keep_best]}
    return [step for step in steps if step not in kept]
