"""Everything about a run that can be known to be wrong before a process starts; nothing here imports torch."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.conf.check import check_layout, check_train
from moexpand.conf.check_encoders import check_time_series, check_vision
from moexpand.conf.fields import changed
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.train.fresh import fresh_architecture
from moexpand.train.run_data import open_data
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import EXPANSION, Checkpoint, open_checkpoint
from moexpand.upcycle.families import family_of
from moexpand.upcycle.logical import ExpandedWeights, StoredWeights, Weights, unsupported
from moexpand.upcycle.plan import PARENT_GROUPS, Plan, read_plan
from moexpand.upcycle.planner import check_map
from moexpand.upcycle.recipe import Recipe

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, `step_...`, inside the run folder."""

PLAN = "plan.json"
"""The run folder's own copy of the plan of `expand`: a run goes on and is exported without the file that it was started with."""


@dataclass(frozen=True)
class Source:
    """Where the weights come from: a checkpoint, a parent expanded while it is loaded, or fresh ones of an architecture."""

    architecture: Architecture
    checkpoint: Weights | None
    plan: Plan | None = None
    """By which a parent is expanded while it is loaded."""

    @cached_property
    def expansion(self) -> Plan | None:
        """By which the model was made of a parent, here or when the checkpoint was written."""
        if self.plan is not None or self.checkpoint is None:
            return self.plan
        file = self.checkpoint.folder / EXPANSION
        return read_plan(file) if file.is_file() else None

    @cached_property
    def parent_groups(self) -> int | None:
        """In how many groups the parent of an expansion routes; None where nothing on the disk tells.

        Children written before the record of the expansion had it may be of a parent with as many groups as they have, or without
        any, if every group holds just its own block of the parent's experts.
        """
        if isinstance(self.checkpoint, ExpandedWeights):
            return self.checkpoint.parent.architecture.router_n_groups
        if self.checkpoint is None or self.expansion is None:
            return None
        recorded = read_json(self.checkpoint.folder / EXPANSION).get(PARENT_GROUPS)
        if type(recorded) is int:
            return recorded
        groups, maps = self.expansion.num_groups, [row for row in self.expansion.slot_to_parent if row]
        in_blocks = all(
            parent * groups // (max(row) + 1) == slot * groups // len(row) for row in maps for slot, parent in enumerate(row)
        )
        return None if groups > 1 and in_blocks else 1

    @property
    def new_vocabulary(self) -> bool:
        """Whether the model has another vocabulary than the folder that its weights come from."""
        return self.plan is not None and self.plan.vocabulary is not None


def source_of(config: TrainCommand) -> Source:
    """Read the architecture from the checkpoint's headers, or from `model`; an `InputError` says what is wrong with either."""
    if config.checkpoint is not None:
        checkpoint = open_supported(config.checkpoint)
        if config.expand is None:
            return Source(_as_trained(checkpoint.architecture, config), StoredWeights(checkpoint))
        own = Path(config.run.dir) / PLAN
        file = Path(config.expand) if Path(config.expand).exists() or not own.exists() else own
        plan = read_plan(file)
        expanded = ExpandedWeights(Recipe(checkpoint, plan, str(file)))
        if not own.exists() or read_plan(own) != plan:  # a map of the run's own was checked before it was copied
            check_map(checkpoint, plan, str(file))
        return Source(_as_trained(expanded.architecture, config), expanded, plan)
    if config.expand is not None:
        raise InputError(f"expand={config.expand} is the plan for a parent; give its folder as checkpoint=FOLDER.")
    return Source(_as_trained(fresh_architecture(config.model), config), None)


def _as_trained(architecture: Architecture, config: TrainCommand) -> Architecture:
    """The architecture with what the run adds: a selection bias, and a type of its own where its routing needs one."""
    architecture = replace(architecture, selection_bias=architecture.selection_bias or config.balance.selection_bias)
    if architecture.router_n_groups > 1 or not architecture.routed_as_usual:
        architecture = replace(architecture, model_type=family_of(architecture.model_type).child)
    if not architecture.routed_as_usual and not family_of(architecture.model_type).own_routing:
        raise InputError(
            f"A model of type {architecture.model_type} cannot be written with a selection bias, scoring_func=sigmoid or a "
            "routed_scaling_factor; leave balance.selection_bias and these keys of the model out."
        )
    return architecture


def open_supported(folder: str) -> Checkpoint:
    """Open a checkpoint and refuse what the engine does not compute."""
    checkpoint = open_checkpoint(Path(folder))
    lacking = unsupported(checkpoint)
    if lacking:
        raise InputError(f"{folder} has {lacking}.")
    return checkpoint


def check(config: TrainCommand, world_size: int) -> tuple[Source, PackedData]:
    """Open model and data and check that they, the layout and the ranks agree."""
    _refuse_shape(config)
    source = source_of(config)
    check_train(config, source.architecture, world_size, _has_selection_bias(config, source))
    encoder = source.architecture.time_series is not None
    check_vision(config, source.architecture.vision, encoder)
    check_time_series(config, encoder)
    data = open_data(config)
    _check_parent(config, data, world_size)
    _check_moments(config)
    check_vocabulary(data, data.sources[0].place, source.architecture)
    check_places(data, data.sources[0].place, source.architecture)
    return source, data


def _check_parent(config: TrainCommand, data: PackedData, world_size: int) -> None:
    """Refuse a parent to compare with that could not be evaluated."""
    folder = config.evaluate.parent
    if folder is None:
        return
    if not config.evaluate.every:
        raise InputError(
            f"evaluate.parent={folder} is compared at evaluations and evaluate.every=0 makes none; give evaluate.every=100."
        )
    architecture = open_supported(folder).architecture
    check_layout(config.parallel, architecture, config.precision.name, world_size)
    check_vocabulary(data, data.sources[0].place, architecture)
    check_places(data, data.sources[0].place, architecture)


def _check_moments(config: TrainCommand) -> None:
    """Refuse a run to take moments from that has no checkpoint."""
    run = config.optim.moments_from
    begun = any((Path(config.run.dir) / CHECKPOINTS).glob("step_*"))  # they are read at step 0 alone
    if run is not None and not begun and not any((Path(run) / CHECKPOINTS).glob("step_*")):
        raise InputError(f"optim.moments_from={run} holds no checkpoint; give the run folder of the parent.")


def _refuse_shape(config: TrainCommand) -> None:
    """A checkpoint has its shape, so keys of a fresh model would change nothing; the default preset gives none."""
    for given in changed(config.model, "model") if config.checkpoint is not None else []:
        raise InputError(
            f"{given} is the shape of a fresh model and checkpoint={config.checkpoint} has its own in config.json; leave "
            "model=... and model.* out."
        )


def _has_selection_bias(config: TrainCommand, source: Source) -> bool:
    """Whether the routers have one before the first step: from the checkpoint, or from the run that goes on."""
    if source.checkpoint is not None and source.checkpoint.architecture.selection_bias:
        return True
    return any((Path(config.run.dir) / CHECKPOINTS).glob("step_*"))


def check_vocabulary(data: PackedData, shards: str, architecture: Architecture) -> None:
    """Refuse shards whose token ids the model may not have."""
    if data.vocab_size > architecture.vocab_size:
        raise InputError(
            f"The tokenizer of {shards} has {data.vocab_size:,} tokens and the model "
            f"{architecture.vocab_size:,}; build the shards with the model's own tokenizer, or give the model "
            f"this one's rows with moexpand upcycle tokenizer=FOLDER vocab_size={data.vocab_size}."
        )


def check_places(data: PackedData, shards: str, architecture: Architecture) -> None:
    """Refuse shards whose pictures or series stand at other tokens than those of the model."""
    vision, encoder = architecture.vision, architecture.time_series
    if vision is not None and data.has_pictures and data.image_token != vision.image_token_id:
        raise InputError(
            f"The tokenizer of {shards} writes pictures with token {data.image_token} and the model has image_token_id="
            f"{vision.image_token_id}; build the shards with the model's own tokenizer, or give data.images=off."
        )
    if encoder is not None and data.has_series and data.series_token != encoder.ts_token_id:
        raise InputError(
            f"The tokenizer of {shards} writes time series with token {data.series_token} and the model has ts_token_id="
            f"{encoder.ts_token_id}; build the shards with the model's own tokenizer, or give data.time_series=off."
        )
