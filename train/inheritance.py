"""Adam's moments that a child takes over from its parent's run."""

from pathlib import Path

from moexpand.base.errors import EnvironmentFailure
from moexpand.conf.train_schema import TrainCommand
from moexpand.parallel.engine import Engine
from moexpand.parallel.inherit import inherit
from moexpand.parallel.ranks import Ranks, gather
from moexpand.train import checkpoints
from moexpand.train.preflight import Source


def inherited_moments(config: TrainCommand, source: Source, engine: Engine, here: Ranks) -> list[str]:
    """Fill the moments as `optim.moments` says; returns lines for the user. All ranks call it, at step 0 alone.

    Raises:
        EnvironmentFailure: the parent's checkpoint is damaged.
        InputError: it is of another model.
    """
    if config.optim.moments_from is None:
        return []
    folder = checkpoints.find(Path(config.optim.moments_from))
    wrong = next(filter(None, gather(checkpoints.damage(folder, slice(here.world_rank, None, here.world_size)))), None)
    if wrong is not None:
        raise EnvironmentFailure(f"The moments of optim.moments_from cannot be taken over: {wrong}")
    maps = None if source.expansion is None else source.expansion.slot_to_parent
    notes = inherit(engine, folder, maps, config.optim.moments == "scale")
    verb = {"copy": "copied", "scale": "scaled by the copies of each expert"}[config.optim.moments]
    return [f"Adam's moments are those of {folder}, {verb}", *sorted({note for each in gather(notes) for note in each})]
