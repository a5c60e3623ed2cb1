"""The batches of a run, step after step, read ahead in processes of their own where the configuration asks for it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import MicroBatch, PackedData
from moexpand.train.run_data import open_data

STEPS_AHEAD = 2
"""Steps that each reading process may have ready."""


@dataclass(frozen=True)
class _Read:
    """What a reading process hands over."""

    batches: list[MicroBatch]
    bad: list[dict[str, str]]
    error: str | None = None


class _Steps(torch.utils.data.Dataset):
    """A rank's micro-batches by step, opened anew in each process: open files and caches do not travel."""

    def __init__(self, config: TrainCommand, rank: int, ranks: int) -> None:
        self._config, self._rank, self._ranks = config, rank, ranks
        self._data: PackedData | None = None

    def __getitem__(self, step: int) -> _Read:
        try:
            if self._data is None:
                self._data = open_data(self._config)
            batches = self._data.batch(step, self._rank, self._ranks, self._config.train.micro_batch)
            return _Read(batches, self._data.bad_by_source)
        except InputError as error:
            return _Read([], [], str(error))


class Batches:
    """A data-parallel rank's micro-batches, step after step.

    Args:
        data: of the run; learns of the unreadable samples that reading processes meet.
        config: of the run; `data.workers` processes read ahead.
        rank, ranks: data-parallel.
        first: step to begin with.
    """

    def __init__(self, data: PackedData, config: TrainCommand, rank: int, ranks: int, first: int) -> None:
        self._data, self._rank, self._ranks = data, rank, ranks
        self._micro_batch = config.train.micro_batch
        self._step = first
        self._ahead: Iterator[_Read] | None = None
        self.waited = 0.0
        """Seconds that the last step's batches were waited for."""
        if config.data.workers and first < config.train.steps:
            loader: Any = torch.utils.data.DataLoader(
                _Steps(config, rank, ranks),
                batch_size=None,
                sampler=range(first, config.train.steps),
                num_workers=config.data.workers,
                prefetch_factor=STEPS_AHEAD,
                multiprocessing_context="spawn",
                collate_fn=_as_it_is,
            )
            self._ahead = iter(loader)

    def __next__(self) -> list[MicroBatch]:
        """The next step's.

        Raises:
            InputError: too many samples are unreadable.
            EnvironmentFailure: a reading process died.
        """
        began = time.perf_counter()
        if self._ahead is None:
            batches = self._data.batch(self._step, self._rank, self._ranks, self._micro_batch)
        else:
            try:
                read = next(self._ahead)
            except RuntimeError as error:
                raise EnvironmentFailure(f"A process that reads data ahead died ({error}); start again to go on.") from error
            if read.error is not None:
                raise InputError(read.error)
            self._data.learn_bad(read.bad)
            batches = read.batches
        self._step += 1
        self.waited = time.perf_counter() - began
        return batches


def _as_it_is(read: Any) -> Any:
    """Arrays stay NumPy's: what they become on the device is not the reading process's business."""
    return read
