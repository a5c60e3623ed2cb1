"""Settings of a vision tower or an encoder of time series that cannot work together, with the model or the layout."""

from collections.abc import Sequence
from typing import Protocol

from moexpand.base.errors import InputError
from moexpand.conf.fields import changed
from moexpand.conf.train_schema import Parallel, TrainCommand

PARTS = ("tower", "projector", "decoder")


class Tower(Protocol):
    """What layouts depend on of a tower, under the names of its Hugging Face config."""

    @property
    def deepstack_visual_indexes(self) -> Sequence[int]: ...


def check_vision(config: TrainCommand, tower: Tower | None, encoder: bool = False) -> None:
    """Check how tower, projector and decoder learn, for a model with this tower or with none.

    Args:
        encoder: the model has an encoder of time series as well, which may learn alone.

    Raises:
        InputError: the first combination that cannot work.
    """
    vision, hears = config.vision, encoder and not config.time_series.freeze
    if tower is None:
        for given in changed(vision, "vision"):
            raise InputError(f"{given} is for a model with a vision tower and this one has none; leave it out.")
        return
    unknown = [part for part in vision.freeze if part not in PARTS]
    if unknown:
        raise InputError(f"vision.freeze names {unknown[0]}; the parts are {', '.join(PARTS)}.")
    if set(vision.freeze) == set(PARTS) and not hears:
        raise InputError(f"vision.freeze=[{','.join(vision.freeze)}] leaves nothing that learns.")
    if "decoder" in vision.freeze and config.parallel.pipeline > 1:
        raise InputError(
            f"vision.freeze=[{','.join(vision.freeze)}] leaves nothing that learns on the later stages of "
            f"parallel.pipeline={config.parallel.pipeline}; give parallel.pipeline=1, or vision.warmup_steps, which keeps the "
            "decoder for as many steps."
        )
    for part in ("tower", "projector"):
        if part in vision.freeze and getattr(vision, f"{part}_lr") != 1.0:
            raise InputError(
                f"vision.{part}_lr has no effect with vision.freeze=[{','.join(vision.freeze)}]; leave one of them out."
            )
    if vision.warmup_steps and {"tower", "projector"} <= set(vision.freeze) and not hears:
        raise InputError(f"vision.warmup_steps={vision.warmup_steps} trains tower and projector, and both are frozen.")
    if vision.warmup_steps > config.train.steps:
        raise InputError(f"vision.warmup_steps={vision.warmup_steps} is more than train.steps={config.train.steps}.")


def check_deepstack(parallel: Parallel, tower: Tower | None, layers: int) -> None:
    """DeepStack's features are where the tower is, on the first part of the pipeline; so must be the layers that take them.

    Raises:
        InputError: that part has too few layers.
    """
    deep = len(tower.deepstack_visual_indexes) if tower is not None else 0
    first = parallel.first_layers
    if not first:
        between = parallel.pipeline - bool(parallel.last_layers)
        first = (layers - parallel.last_layers) // (between * parallel.interleave)
    if first < deep:
        raise InputError(
            f"DeepStack adds features to the first {deep} layers, and with parallel.pipeline={parallel.pipeline} and "
            f"parallel.interleave={parallel.interleave} the first part has {first}; choose smaller ones, or "
            f"parallel.first_layers={deep} or more."
        )


def check_time_series(config: TrainCommand, encoder: bool) -> None:
    """Check how an encoder of time series learns, for a model that has one or none.

    Raises:
        InputError: the first setting that has no effect.
    """
    given = changed(config.time_series, "time_series")
    if given and not encoder:
        raise InputError(f"{given[0]} is for a model with an encoder of time series and this one has none.")
    if config.time_series.freeze and config.time_series.lr != 1.0:
        raise InputError(f"time_series.lr={config.time_series.lr} has no effect with time_series.freeze=true; leave one out.")
