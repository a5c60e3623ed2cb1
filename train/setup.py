"""From a configuration to the engine of a run."""

from dataclasses import fields
from typing import Any

from moexpand.conf.schema import Parallel, TrainCommand
from moexpand.parallel.engine import Engine
from moexpand.parallel.optimizer import AdamSettings
from moexpand.parallel.ranks import Ranks
from moexpand.parallel.shape import Layout, ModelShape, RouterRules
from moexpand.train import weights
from moexpand.train.preflight import Source
from moexpand.upcycle.architecture import Architecture


def shape_of(architecture: Architecture) -> ModelShape:
    """The engine's view of a checkpoint's architecture."""
    return ModelShape(**{field.name: getattr(architecture, field.name) for field in fields(ModelShape)})


def layout_of(parallel: Parallel) -> Layout:
    """The engine's layout."""
    return Layout(**{field.name: getattr(parallel, field.name) for field in fields(Layout)})


def build_engine(config: TrainCommand, source: Source, here: Ranks) -> Engine:
    """An engine with its weights filled and its optimiser ready."""
    rules = RouterRules(config.router.gradient, config.router.temperature, config.balance.coefficient, config.balance.z_loss)
    engine = Engine(shape_of(source.architecture), layout_of(config.parallel), rules, config.precision.name, here)
    if source.checkpoint is None:
        engine.fill(weights.fresh(source.architecture, config.seed))
    else:
        weights.load(engine, source.checkpoint)
    engine.prepare_training(AdamSettings(**{field.name: getattr(config.optim, field.name) for field in fields(AdamSettings)}))
    return engine


def fixed_settings(config: TrainCommand, fingerprint: str) -> dict[str, Any]:
    """What shapes the trajectory and must stay when a run goes on; layout, length, tracking and saving may change."""
    return {
        "seed": config.seed,
        "checkpoint": config.checkpoint,
        "precision": config.precision.name,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.seq_length": config.train.seq_length,
        "data.held_out": config.data.held_out,
        "tokenizer": fingerprint,
    }
