"""Saves and loads an engine's weights and optimiser states, sharded, through Megatron-Core's distributed checkpoints.

The files do not depend on the layout: every tensor is stored under its place in the whole model, so that a run goes on at
another size. Publishing the folder (temporary name, rename) is the trainer's business.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from moexpand.base.files import Fact
from moexpand.parallel import cpu, optimizer_state, ranks
from moexpand.parallel.checkpoint_files import Background, Buffer, Strategy
from moexpand.parallel.checkpoint_reader import LoadStrategy
from moexpand.parallel.engine import Engine
from moexpand.parallel.optimizer import apply_settings, weights_settled


class Writer:
    """Writes an engine's checkpoints, one at a time; buffers and plans are kept from one to the next.

    All ranks call `start` and `finish` together. The engine must not be told to step before `start` has returned; its next update
    waits until the states are copied.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._files = Strategy()
        # What several data-parallel ranks hold is written by one of them, and these share the work evenly.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._shared_out = FullyParallelSaveStrategyWrapper(self._files, group, do_cache_distribution=True)
        self._background = Background()
        self._buffer = Buffer()
        self._folder: Path | None = None
        self._finalize: list[Any] = []
        self._checked = False
        engine.before_update = self._wait_for_copy

    def start(self, folder: Path, extra: dict[str, Any], background: bool) -> None:
        """Begin to write weights, optimiser states and `extra` into an existing empty folder.

        Args:
            extra: plain Python values, equal on all ranks.
            background: copy the states while the engine computes its next gradients and write the copies while it goes on;
                otherwise all is written on return.
        """
        assert self._folder is None, "a checkpoint is still being written"
        cpu.enable()
        self._folder = folder
        self._files.buffer = self._buffer if background else None
        engine = self._engine
        with weights_settled(engine.wrapped):
            model_state = state_of_model(engine)
            optimizer_state.initialise(engine.optimizer)
            state = {
                "model": model_state,
                "optimizer": optimizer_state.sharded(engine.optimizer, model_state),
                "extra": {**extra, "adam_step": optimizer_state.adam_step(engine.optimizer)},
            }
            request = dist_checkpointing.save(
                state, str(folder), self._shared_out, validate_access_integrity=not self._checked, async_sharded_save=True
            )
            self._checked = True
            self._finalize = request.finalize_fns
            if not background:
                request.async_fn()
        if background:
            self._background.start(request.async_fn)

    def _wait_for_copy(self) -> None:
        if self._background.running and self._files.file is not None:
            self._files.file.copied.wait()

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._background.running

    @property
    def open(self) -> bool:
        """Whether a checkpoint was begun and is not finished; the same on all ranks."""
        return self._folder is not None

    def finish(self) -> dict[str, Fact]:
        """Wait for this rank's file and complete the folder; returns size and checksum of the files that this rank wrote.

        Raises:
            EnvironmentFailure: on all ranks, one of them could not write its file.
        """
        assert self._folder is not None, "no checkpoint was begun"
        assert self._files.file is not None
        self._folder = None
        self._background.wait()
        file = self._files.file
        finalize, self._finalize = self._finalize, []
        for complete in finalize:
            complete()
        return {} if file.name is None or file.written.fact is None else {file.name: file.written.fact}


def save(engine: Engine, folder: Path, extra: dict[str, Any]) -> None:
    """Write a checkpoint from begin to end; see `Writer`."""
    writer = Writer(engine)
    writer.start(folder, extra, background=False)
    writer.finish()


def nbytes(engine: Engine) -> int:
    """Bytes that a checkpoint of a prepared engine takes, up to a few per mille; all ranks call it."""
    shares = [
        parameter.nbytes / _replicas(parameter) for stage in engine.stages for parameter in stage.parameters()
    ]  # each replica counts its share of a weight
    states = sum(
        (12 if parameter.dtype == torch.bfloat16 else 8) * span.size
        for part in optimizer_state.parts(engine.optimizer)
        for parameter in part.model_param_group_index_map
        for span in [part._get_model_param_range_map(parameter)["param"]]
    )
    held = torch.tensor(sum(shares) + states, dtype=torch.float64, device=cpu.device())
    return int(ranks.add_up(held))


def _replicas(parameter: torch.Tensor) -> int:
    """Ranks that hold the same weight."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_world_size()


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load what a `Writer` wrote, at this engine's layout; weights alone where the engine has no optimiser.

    Returns:
        `extra` as it was given to the writer.
    """
    cpu.enable()
    model_state = state_of_model(engine)
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for part in model_state.values():
        # A run may take up the gradient `default_vector` on its way; its averages then begin empty.
        for name in [name for name in part if ".default_vectors." in name and part[name].key not in stored]:
            del part[name]
    state: dict[str, Any] = {"model": model_state}
    if engine.optimizer is not None:
        optimizer_state.initialise(engine.optimizer)
        state["optimizer"] = optimizer_state.sharded(engine.optimizer, model_state)  # filled where they lie
    loaded = dist_checkpointing.load(state, str(folder), LoadStrategy())
    for number, stage in enumerate(engine.stages):
        held = stage.state_dict()
        # Most were filled where they lie.
        moved = {name: value for name, value in loaded["model"][f"part{number}"].items() if not _same(value, held[name])}
        stage.load_state_dict(moved, strict=False)
    extra: dict[str, Any] = loaded["extra"]
    if engine.optimizer is not None:
        optimizer_state.set_adam_step(engine.optimizer, extra["adam_step"])
        apply_settings(engine.optimizer, engine.settings)
    return {name: value for name, value in extra.items() if name != "adam_step"}


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors are the same memory."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and one.data_ptr() == other.data_ptr() and one.nbytes == other.nbytes


def state_of_model(engine: Engine) -> dict[str, Any]:
    """The stages' tensors, each stored under its place in the whole model."""
    return {f"part{number}": stage.sharded_state_dict(metadata={}) for number, stage in enumerate(engine.stages)}
