"""Everything about a run that can be known to be wrong before a process starts; nothing here imports torch."""

from dataclasses import dataclass, fields
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.conf.check import check_train
from moexpand.conf.schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Source:
    """Where the weights come from: a checkpoint, or fresh ones of an architecture."""

    architecture: Architecture
    checkpoint: Checkpoint | None


def source_of(config: TrainCommand) -> Source:
    """Read the architecture from the checkpoint's headers, or from `model`; an `InputError` says what is wrong with either."""
    if config.checkpoint is not None:
        checkpoint = open_supported(config.checkpoint)
        return Source(checkpoint.architecture, checkpoint)
    model_type = "qwen3_moe_grouped" if config.model.router_n_groups > 1 else "qwen3_moe"
    sizes = {field.name: getattr(config.model, field.name) for field in fields(config.model)}
    return Source(Architecture(model_type=model_type, **sizes), None)


def open_supported(folder: str) -> Checkpoint:
    """Open a checkpoint and refuse what the engine does not compute."""
    checkpoint = open_checkpoint(Path(folder))
    architecture = checkpoint.architecture
    if architecture.rope_type != "default":
        raise InputError(
            f"{folder} has rope_type={architecture.rope_type}; the engine computes plain rotary embedding (default) alone."
        )
    if architecture.sliding_window is not None:
        raise InputError(f"{folder} has sliding_window={architecture.sliding_window}; the engine computes full attention alone.")
    return checkpoint


def open_data(config: TrainCommand) -> PackedData:
    """The packed batches of the run's shards."""
    return PackedData(
        Path(config.data.shards),
        config.train.seq_length,
        config.train.global_batch,
        config.seed,
        held_out=config.data.held_out,
        tokenizer=config.data.tokenizer,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def check(config: TrainCommand, world_size: int) -> tuple[Source, PackedData]:
    """Open model and data and check that they, the layout and the ranks agree."""
    source = source_of(config)
    check_train(config, source.architecture, world_size)
    data = open_data(config)
    if data.vocab_size > source.architecture.vocab_size:
        raise InputError(
            f"The tokenizer of {config.data.shards} has {data.vocab_size:,} tokens and the model "
            f"{source.architecture.vocab_size:,}; build the shards with the model's own tokenizer."
        )
    return source, data
