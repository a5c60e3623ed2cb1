"""From a configuration to the engine of a run."""

import json
from dataclasses import asdict, fields
from typing import Any

from moexpand.conf.layers import layer_factors
from moexpand.conf.train_schema import Parallel, TrainCommand
from moexpand.data.loader import PackedData
from moexpand.data.packing import PACKING
from moexpand.parallel.engine import Engine
from moexpand.parallel.optimizer import AdamSettings
from moexpand.parallel.ranks import Ranks
from moexpand.parallel.shape import Layout, ModelShape, RouterRules, TimeSeriesShape, VisionShape
from moexpand.train import weights
from moexpand.train.preflight import Source
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.families import family_of


def shape_of(architecture: Architecture) -> ModelShape:
    """The engine's view of a checkpoint's architecture."""
    seen = architecture.vision
    vision = None if seen is None else VisionShape(**{each.name: getattr(seen, each.name) for each in fields(VisionShape)})
    heard = architecture.time_series
    series = None if heard is None else TimeSeriesShape(**asdict(heard))
    parts = ("prefix", "vision", "time_series")
    own = {each.name: getattr(architecture, each.name) for each in fields(ModelShape) if each.name not in parts}
    return ModelShape(**own, prefix=family_of(architecture.model_type).prefix, vision=vision, time_series=series)


def layout_of(parallel: Parallel) -> Layout:
    """The engine's layout."""
    return Layout(**{field.name: getattr(parallel, field.name) for field in fields(Layout)})


def build_engine(config: TrainCommand, source: Source, here: Ranks) -> Engine:
    """An engine whose weights are not filled yet."""
    shape = shape_of(source.architecture)
    return Engine(shape, layout_of(config.parallel), rules_of(config, shape.num_hidden_layers), config.precision.name, here)


def rules_of(config: TrainCommand, layers: int) -> RouterRules:
    """How the routers learn."""
    router, balance = config.router, config.balance
    return RouterRules(
        gradient=router.gradient,
        temperature=router.temperature,
        normalised=router.normalised,
        default_decay=router.default_decay,
        freeze=router.freeze,
        balance_coefficient=balance.coefficient,
        group_coefficient=balance.group_coefficient,
        z_loss_coefficient=balance.z_loss,
        scope=balance.scope,
        layer_factors=layer_factors("balance.layers", balance.layers, layers),
        bias_rate=balance.bias_rate,
    )


def fill(engine: Engine, source: Source, seed: int) -> None:
    """The weights that a run starts from."""
    if source.checkpoint is None:
        engine.fill(weights.fresh(source.architecture, seed))
    else:
        weights.load(engine, source.checkpoint)


def rounded_routers(config: TrainCommand, source: Source) -> list[str]:
    """A line when the routers alone were stored in fp32, to keep their noise, and the precision of the run rounds it away."""
    if source.checkpoint is None or config.precision.name != "bf16":
        return []
    first = slice(0, 1)
    names = [name for name in source.checkpoint.names if name.endswith((".mlp.gate.weight", ".input_layernorm.weight"))][:2]
    dtypes = {name.endswith(".gate.weight"): source.checkpoint.read_torch(name, first).dtype for name in names}
    if dtypes[True] == dtypes[False] or str(dtypes[True]) != "torch.float32":
        return []
    return ["WARNING: the routers are stored in float32 and precision=bf16 rounds them: noise below 0.002 of a row's RMS is lost"]


def adam_of(config: TrainCommand) -> AdamSettings:
    """The engine's optimiser settings."""
    optim = config.optim
    shared = {field.name: getattr(optim, field.name) for field in fields(AdamSettings) if hasattr(optim, field.name)}
    frozen = (*config.vision.freeze, *(["time_series"] if config.time_series.freeze else []))
    return AdamSettings(**shared, frozen_routers=config.router.freeze, frozen_parts=frozen)


def layout_notes(config: TrainCommand, source: Source) -> list[str]:
    """A line when the experts' ranks do not hold whole groups, so that grouped routing does not balance them by itself."""
    groups, expert = source.architecture.router_n_groups, config.parallel.expert
    if groups == 1 or groups % expert == 0:
        return []
    return [
        f"note: parallel.expert={expert} does not divide the {groups} groups: every group still gets as many tokens, but "
        "a rank's share of its group depends on the routing"
    ]


_SINCE_PICTURES = ("mrope_section", "fope_frequencies", "fope_by_head", "fope_init_factor", "vision", "time_series")
"""Fields of an architecture that runs of earlier versions did not note, for models without them."""


def fixed_settings(config: TrainCommand, source: Source, data: PackedData) -> dict[str, Any]:
    """What the trajectory follows from and must stay when a run goes on; layout, length, tracking and saving may change."""
    return {
        "seed": config.seed,
        "precision": config.precision.name,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.seq_length": config.train.seq_length,
        "data.held_out": config.data.held_out,
        "data.shuffle": config.data.shuffle,
        "the plan of expand": None if source.plan is None else source.plan.digest,
        "tokenizer": data.fingerprint,
        "the samples of the shards": data.corpus_fingerprint,
        "the rules of packing": PACKING,
        **({"vision.freeze": sorted(config.vision.freeze)} if source.architecture.vision is not None else {}),
        **({"time_series.freeze": config.time_series.freeze} if source.architecture.time_series is not None else {}),
        **{
            f"the model's {name}": json.loads(json.dumps(value))  # as it comes back from the checkpoint
            for name, value in asdict(source.architecture).items()
            if name != "dtype" and (value or name not in _SINCE_PICTURES)
        },
    }


def noted_settings(config: TrainCommand, source: Source) -> dict[str, Any]:
    """What may change when a run goes on and is then told, as it bends the curve."""
    groups = {"optim": asdict(config.optim), "router": asdict(config.router), "balance": asdict(config.balance)}
    noted = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    if source.architecture.vision is not None:
        noted |= {f"vision.{key}": value for key, value in asdict(config.vision).items() if key != "freeze"}
    if source.architecture.time_series is not None:
        noted["time_series.lr"] = config.time_series.lr
    return noted
