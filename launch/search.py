"""Optuna's part of a sweep: it proposes points, hears what became of them, and remembers both in the sweep's folder."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.conf.axes import Axis
from moexpand.conf.launch_schema import Sweep

JOURNAL = "optuna.journal"
ABOUT, FAILED = "settings", "failed once"
"""Attributes of a study."""


@dataclass(frozen=True)
class Trial:
    """A proposed point: its number, and the words that it adds to the command line."""

    number: int
    words: tuple[str, ...]


class Search:
    """A study in `folder`, which goes on where it stood when it is opened again.

    Args:
        folder: the sweep's folder.
        settings: how many trials, and the seed.
        axes: the keys that are searched.
        whole: the keys among them that hold whole numbers.
        about: what all points have in common; results under other settings are not comparable.

    Raises:
        InputError: Optuna is not installed, or the study was begun over other axes or with other settings.
    """

    def __init__(self, folder: Path, settings: Sweep, axes: list[Axis], whole: set[str], about: Sequence[str] = ()) -> None:
        try:
            import optuna
        except ImportError:
            raise InputError("sweep=optuna needs Optuna; install it with pip install 'moexpand[sweep]'.") from None
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(logging.WARNING)
        self._states = optuna.trial.TrialState
        self._limit = settings.trials
        self._space = {axis.key: _distribution(optuna.distributions, axis, axis.key in whole) for axis in axes}
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
        # A sampler that was made anew would propose its first points again.
        self._study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(self._study.trials))
        begun = self._study.user_attrs.get(ABOUT)
        if begun is None:
            self._study.set_user_attr(ABOUT, list(about))
        elif begun != list(about):
            changed = ", ".join(sorted(set(begun) ^ set(about)))
            raise InputError(
                f"The search in {folder} was begun with other settings ({changed}); give the same, or another run.dir."
            )
        for trial in self._study.trials:
            if trial.distributions != self._space:
                raise InputError(
                    f"The search in {folder} was begun over {_told(trial.distributions)} and is now over {_told(self._space)}; "
                    "give the same values, or another run.dir."
                )

    def trials(self) -> Iterator[Trial]:
        """Points that were begun and not finished, then new ones until there are enough."""
        for begun in self._study.get_trials(states=(self._states.RUNNING,)):
            yield Trial(begun.number, _words(begun.params))
        while len(self._study.trials) < self._limit:
            new = self._study.ask(self._space)
            yield Trial(new.number, _words(new.params))

    def tell(self, number: int, value: float | None) -> None:
        """Tell what became of a point: its value, or None when it failed."""
        if value is None:
            self._study.tell(number, state=self._states.FAIL)
        else:
            self._study.tell(number, value)

    def failed_before(self, number: int) -> bool:
        """Note that a point's machine failed; whether it did so before."""
        failed = self._study.user_attrs.get(FAILED, [])
        self._study.set_user_attr(FAILED, [*failed, number])
        return number in failed

    def ranking(self) -> list[tuple[int, float]]:
        """Numbers and values of the finished points, the best one first."""
        done = self._study.get_trials(states=(self._states.COMPLETE,))
        return sorted(((trial.number, trial.value or 0.0) for trial in done), key=lambda pair: pair[1])


def _distribution(distributions: Any, axis: Axis, whole: bool) -> Any:
    if axis.interval is None:
        return distributions.CategoricalDistribution(axis.values)
    low, high = axis.interval
    if axis.logarithmic and low <= 0:
        raise InputError(f"{axis.key} is searched by its logarithm and begins at {low:g}; begin above 0.")
    if whole:
        return distributions.IntDistribution(int(low), int(high), log=axis.logarithmic)
    return distributions.FloatDistribution(low, high, log=axis.logarithmic)


def _words(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in values.items())


def _told(space: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(each).partition('Distribution')[2]}" for key, each in space.items())
