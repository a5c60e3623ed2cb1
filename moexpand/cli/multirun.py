"""`moexpand train --multirun`: a run for each point of a sweep, each with workers or a job of its own.

Every point is a run folder inside `run.dir`. The same command goes on: points that are done are passed over, those that were
begun go on from their checkpoint.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import DONE, ENVIRONMENT, STOPPED, CheckFailed, InputError, MoexpandError
from moexpand.base.files import disk_errors
from moexpand.base.result import read_result
from moexpand.cli.train import check, start
from moexpand.conf.axes import Axis, combinations, point_name, split_axes
from moexpand.conf.compose import compose, to_yaml
from moexpand.conf.keys import keys_of
from moexpand.conf.train_schema import TrainCommand
from moexpand.launch.search import Search, Trial
from moexpand.launch.slurm import queued, queued_job, states
from moexpand.launch.torchrun import LAUNCHED
from moexpand.train.tables import EVALUATIONS, METRICS, read_rows

POLL_SECONDS = 15.0
NAME = "trial_{:04}"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    config: TrainCommand

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def done(self) -> bool:
        """Whether it came to its end with this very configuration."""
        result, launched = read_result(self.folder), self.folder / LAUNCHED
        if result is None or result.code != DONE or not launched.is_file():
            return False
        return launched.read_text(encoding="utf-8") == to_yaml(self.config)


Make = Callable[[str, tuple[str, ...]], Point]


def multirun(overrides: list[str], config_dir: str | None, config_name: str | None) -> int:
    """Start the points of a sweep; returns 0, or the first other code of a point."""
    fixed, axes = split_axes(overrides)
    if not axes:
        raise InputError("--multirun needs a key with several values, as in optim.lr=1e-5,3e-5.")
    whole = {axis.key for axis in axes if (key := keys_of(TrainCommand).get(axis.key)) is not None and key.type is int}
    base: TrainCommand = compose("train", fixed + [axis.first for axis in axes], config_dir, config_name)
    folder = Path(base.run.dir)
    _check_sweep(base, axes)

    def make(name: str, words: tuple[str, ...]) -> Point:
        tracked = [f"run.dir={folder / name}", f"track.name={name}", f"track.group={base.track.group or folder.name}"]
        kept = [word for word in fixed if not word.lstrip("+").startswith(("run.dir=", "sweep"))]
        return Point(name, compose("train", [*kept, *words, *tracked], config_dir, config_name))

    if base.sweep.sampler == "optuna":
        free = ("run.", "launch", "sweep.trials", "sweep.parallel", "track", "plain", "debug")
        about = sorted(word for word in fixed if not word.lstrip("+").startswith(free))
        return _search(base, axes, whole, about, make)
    return _all(base, [make(point_name(words), words) for words in combinations(axes)])


def _check_sweep(base: TrainCommand, axes: list[Axis]) -> None:
    """Refuse what a sweep cannot do."""
    for axis in axes:
        if axis.key.startswith(("run.", "launch", "sweep", "track")):
            raise InputError(f"{axis.key} must be the same at all points of a sweep; give one value.")
    if base.track.name is not None:
        raise InputError(
            f"track.name={base.track.name} would be the name of every point, which have names of their own; leave it out."
        )
    sweep = base.sweep
    if sweep.sampler == "optuna":
        if base.launch.name == "torchrun":
            raise InputError(
                "launch=torchrun only writes scripts, so sweep=optuna would hear no result; give launch=slurm or local."
            )
        if sweep.parallel > 1 and base.launch.name != "slurm":
            raise InputError(
                f"sweep.parallel={sweep.parallel} needs launch=slurm: on this machine points run one after the other."
            )
        if sweep.metric == "held_out_loss" and not base.evaluate.every:
            raise InputError("sweep.metric=held_out_loss needs evaluations; give evaluate.every=100, or sweep.metric=loss.")


def _all(base: TrainCommand, points: list[Point]) -> int:
    """Every combination, one after the other; all are checked before the first starts."""
    if len({point.name for point in points}) < len(points):
        raise InputError("Two points of the sweep would have one folder, as their values are spelt alike; leave one out.")
    for point in points:
        check(point.config)
    if base.launch.dry_run:
        print(f"{len(points)} points, all of them sound:")
        print("\n".join(f"{point.folder}{'  (done)' if point.done else ''}" for point in points))
        return DONE
    code = DONE
    for number, point in enumerate(points, 1):
        print(f"---- point {number} of {len(points)}: {point.folder}", flush=True)
        job, state = queued(point.folder)
        if state:
            print(f"job {job} is {state}")
        elif point.done:
            print("done before")
        else:
            ended = start(point.config)
            code = code or ended
            if ended == STOPPED:
                return ended
    if base.launch.name == "local":
        _tell([point.folder for point in points], base.sweep.metric)
    return code


def _search(base: TrainCommand, axes: list[Axis], whole: set[str], about: list[str], make: Make) -> int:
    """Points that Optuna proposes, as many at a time as `sweep.parallel`.

    A point that cannot work, or whose check failed, counts as failed. One that was stopped, or whose machine failed, stays open
    and ends the search; the same command goes on with it. One whose machine fails a second time counts as failed, so that a point
    that no machine can hold does not end every search.
    """
    folder = Path(base.run.dir)
    if base.launch.dry_run:
        raise InputError("launch.dry_run=true has nothing to show of sweep=optuna, whose points depend on results; leave it out.")
    with disk_errors(f"preparing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    search = Search(folder, base.sweep, axes, whole, about)
    proposed: Iterator[Trial] = search.trials()
    running: dict[int, Point] = {}
    while True:
        while len(running) < base.sweep.parallel and (trial := next(proposed, None)) is not None:
            print(f"---- trial {trial.number + 1} of {base.sweep.trials}: {' '.join(trial.words)}", flush=True)
            point, ended = _begin(make, trial)
            if ended is None and point is not None:
                running[trial.number] = point
            elif stop := _conclude(search, trial.number, point, ended, base.sweep.metric):
                return stop
        if not running:
            break
        time.sleep(POLL_SECONDS)
        jobs = {number: queued_job(point.folder) for number, point in running.items()}
        found = states([job for job in jobs.values() if job])
        for number in [number for number, job in jobs.items() if not found.get(job)]:
            point = running.pop(number)
            result = read_result(point.folder)
            ended = ENVIRONMENT if result is None else result.code
            if stop := _conclude(search, number, point, ended, base.sweep.metric):
                return stop
    ranking = search.ranking()
    _tell([folder / NAME.format(number) for number, _ in ranking[:10]], base.sweep.metric)
    if not ranking:
        raise CheckFailed(f"None of the {base.sweep.trials} trials came to its end; what was wrong stands above.")
    return DONE


def _begin(make: Make, trial: Trial) -> tuple[Point | None, int | None]:
    """Start a proposed point; the point, and its code, or None while its job goes on."""
    try:
        point = make(NAME.format(trial.number), trial.words)
        if queued(point.folder)[1]:
            return point, None
        if point.done:
            return point, DONE
        check(point.config)
    except InputError as error:
        print(f"{error}", flush=True)
        return None, error.exit_code
    code = start(point.config)
    return point, None if point.config.launch.name == "slurm" else code


def _conclude(search: Search, number: int, point: Point | None, code: int | None, metric: str) -> int:
    """Tell the search what became of a point; returns the code with which the search is to end, 0 to go on."""
    again = code == ENVIRONMENT and search.failed_before(number)
    if code == STOPPED or (code == ENVIRONMENT and not again):
        return code
    value = value_of(point.folder, metric) if code == DONE and point is not None else None
    print(f"trial {number + 1}: " + (f"failed with code {code}" if value is None else f"{metric} {value:.4f}"), flush=True)
    search.tell(number, value)
    return DONE


def value_of(folder: Path, metric: str) -> float | None:
    """What a run came to: its last held-out loss, or the mean loss of its last tenth of steps; None where it has none."""
    try:
        if metric == "held_out_loss":
            rows = read_rows(folder / EVALUATIONS)
            return float(rows[-1]["held_out_loss"]) if rows else None
        rows = read_rows(folder / METRICS)
        last = [row["loss"] for row in rows[-max(1, len(rows) // 10) :] if row["loss"] is not None]
        return sum(last) / len(last) if last else None
    except (MoexpandError, OSError, KeyError, TypeError):
        return None


def _tell(folders: list[Path], metric: str) -> None:
    """Runs in the order of what they came to."""
    values = {folder: value_of(folder, metric) for folder in folders}
    if metric == "held_out_loss" and all(value is None for value in values.values()):
        metric, values = "loss", {folder: value_of(folder, "loss") for folder in folders}
    ranked = sorted(values.items(), key=lambda pair: (pair[1] is None, pair[1] or 0.0))
    print(f"---- {metric}")
    for folder, value in ranked:
        print(f"{'-' if value is None else f'{value:.4f}'}  {folder}")
    if len(ranked) > 1:
        best, *others = [str(folder) for folder, _ in ranked]
        print(f"compare them: moexpand report run={best} compare=[{','.join(others)}]")
