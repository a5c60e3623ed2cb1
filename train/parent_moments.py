"""Adam's moments that a child takes over from its parent's run."""

from pathlib import Path

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.conf.compose import from_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.parallel.engine import Engine
from moexpand.parallel.parent_moments import inherit
from moexpand.parallel.ranks import Ranks, broadcast, gather
from moexpand.train import checkpoints
from moexpand.train.preflight import Source
from moexpand.train.saving import CONFIG


def inherited_moments(config: TrainCommand, source: Source, engine: Engine, here: Ranks) -> list[str]:
    """Fill the moments as `optim.moments` says; returns lines for the user. All ranks call it, at step 0 alone.

    Raises:
        EnvironmentFailure: the parent's checkpoint is damaged.
        InputError: it is of another model.
    """
    if config.optim.moments_from is None:
        return []
    folder = broadcast(checkpoints.find(Path(config.optim.moments_from)) if here.main else None)
    wrong = next(filter(None, gather(checkpoints.damage(folder, slice(here.world_rank, None, here.world_size)))), None)
    if wrong is not None:
        raise EnvironmentFailure(f"The moments of optim.moments_from cannot be taken over: {wrong}")
    maps = None if source.expansion is None or _same_start(config, folder) else source.expansion.slot_to_parent
    notes = inherit(engine, folder, maps, config.optim.moments == "scale")
    verb = {"copy": "copied", "scale": "scaled by the copies of each expert"}[config.optim.moments]
    return [f"Adam's moments are those of {folder}, {verb}", *sorted({note for each in gather(notes) for note in each})]


def _same_start(config: TrainCommand, folder: Path) -> bool:
    """Whether the run of a checkpoint began with the very model that this one begins with, rather than with its parent."""
    try:
        begun: TrainCommand = from_yaml(folder / CONFIG, "train")
    except InputError:  # written by an older version, or with keys that there are no more
        return False
    return begun.checkpoint == config.checkpoint and begun.expand == config.expand
