"""Saves and loads an engine's weights and optimiser states, sharded, through Megatron-Core's distributed checkpoints.

The files do not depend on the layout: every tensor is stored under its place in the whole model, so that a run goes on at
another size. Publishing the folder (temporary name, rename) is the trainer's business.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import torch as _torch_dist  # noqa: F401 - loaded now, so that cpu.enable() reaches it
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from moexpand.base.errors import EnvironmentFailure
from moexpand.parallel import cpu
from moexpand.parallel.engine import Engine
from moexpand.parallel.optimizer import apply_settings, weights_settled

# Copied at every use: Megatron-Core notes the process group of the moment in it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # The states of a data-parallel group are gathered on its first rank, through main memory, not on all of them.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def save(engine: Engine, folder: Path, extra: dict[str, Any]) -> None:
    """Write weights, optimiser states and `extra` into an existing empty folder; all ranks call this together.

    Args:
        extra: plain Python values, equal on all ranks.

    Raises:
        EnvironmentFailure: a rank could not write its part.
    """
    cpu.enable()
    with weights_settled(engine.wrapped):
        _save(engine, folder, extra)


def _save(engine: Engine, folder: Path, extra: dict[str, Any]) -> None:
    model_state = _model_state(engine)
    optimizer_state = engine.optimizer.sharded_state_dict(model_state, metadata=dict(_METADATA))
    # With one optimiser alone, as where no expert learns, Megatron-Core gives its state and no table of several.
    for part in [optimizer_state] if "param_state" in optimizer_state else optimizer_state.values():
        if part["param_state"] is None:  # held by the first rank of the data-parallel group
            del part["param_state"]
    state = {
        "model": model_state,
        "optimizer": optimizer_state,
        "extra": {**extra, "adam_step": _adam_step(engine.optimizer)},
    }
    try:
        dist_checkpointing.save(state, str(folder), get_default_save_sharded_strategy("torch_dist", 1))
    except CheckpointException as error:
        reasons = sorted({str(failure[0]) for failure in error.failures.values()})
        raise EnvironmentFailure(f"The checkpoint {folder} could not be written: {'; '.join(reasons)}") from error


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Load what `save` wrote, at this engine's layout; weights alone where the engine has no optimiser.

    Returns:
        `extra` as it was given to `save`.
    """
    cpu.enable()
    model_state = _model_state(engine)
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for part in model_state.values():
        # A run may take up the gradient `default_vector` on its way; its averages then begin empty.
        for name in [name for name in part if ".default_vectors." in name and part[name].key not in stored]:
            del part[name]
    state: dict[str, Any] = {"model": model_state}
    if engine.optimizer is not None:
        _initialise_states(engine.optimizer)
        state["optimizer"] = engine.optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(_METADATA))
    loaded = dist_checkpointing.load(state, str(folder), get_default_load_sharded_strategy(str(folder)))
    for number, stage in enumerate(engine.stages):
        stage.load_state_dict(stage.state_dict() | loaded["model"][f"part{number}"])
    extra: dict[str, Any] = loaded["extra"]
    if engine.optimizer is not None:
        for part in _parts(engine.optimizer):
            part._set_main_param_and_optimizer_states = partial(_copy_states, part)
        engine.optimizer.load_state_dict(loaded["optimizer"])
        _set_adam_step(engine.optimizer, extra["adam_step"])
        apply_settings(engine.optimizer, engine.settings)
    return {name: value for name, value in extra.items() if name != "adam_step"}


def _model_state(engine: Engine) -> dict[str, Any]:
    """The stages' tensors, each stored under its place in the whole model."""
    return {f"part{number}": stage.sharded_state_dict(metadata=dict(_METADATA)) for number, stage in enumerate(engine.stages)}


def _parts(optimizer: Any) -> list[DistributedOptimizer]:
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _adam_step(optimizer: Any) -> float:
    """Number of updates that AdamW has made (0 before the first)."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            return float(state["step"])
    return 0.0


def _set_adam_step(optimizer: Any, step: float) -> None:
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(step, dtype=torch.float32, device=state["exp_avg"].device)


def _copy_states(part: DistributedOptimizer, model_parameter: torch.nn.Parameter, loaded: dict[str, torch.Tensor]) -> None:
    """Copy one parameter's fp32 value and moments into this rank's shard.

    Megatron-Core's own version also wants a step count for each parameter from torch's AdamW, which it never saves.
    """
    group, position = part.model_param_group_index_map[model_parameter]
    shard = part.optimizer.param_groups[group]["params"][position]
    shard.copy_(loaded["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        part.optimizer.state[shard][name].copy_(loaded[name])


def _initialise_states(optimizer: Any) -> None:
    """Give every parameter its moments (zero), which torch's AdamW makes at its first step alone."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                if not part.optimizer.state[shard]:
                    part.optimizer.state[shard] = {
                        "step": torch.tensor(0.0, device=shard.device),
                        "exp_avg": torch.zeros_like(shard),
                        "exp_avg_sq": torch.zeros_like(shard),
                    }
