"""`moexpand convert`: another kind of model of a checkpoint, and what that costs before any training."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import refuse_existing, refuse_inside
from moexpand.cli.workers import run_beside
from moexpand.conf.fields import changed
from moexpand.conf.model_schema import TimeSeriesModel, VisionModel
from moexpand.conf.schema import ConvertCommand
from moexpand.console import Console
from moexpand.train import damage
from moexpand.train.fresh import fresh_encoder, fresh_tower
from moexpand.upcycle.architecture import TimeSeriesArchitecture, VisionArchitecture
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.conversion import Changes, Conversion
from moexpand.upcycle.family import part_of
from moexpand.upcycle.folder import write_checkpoint

LAUNCHED = "launch.yaml"
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def run(config: ConvertCommand) -> int:
    """Check, say what changes, write, measure."""
    console = Console(config.plain)
    source, target = open_checkpoint(Path(config.source)), Path(config.target)
    refuse_existing(target)
    refuse_inside(target, source.folder)
    conversion = Conversion(source, changes_of(config, source))
    job = damage.check(config, source, conversion)
    _announce(console, conversion)
    without = () if conversion.architecture.vision is not None else PICTURE_FILES
    write_checkpoint(
        target,
        conversion.config,
        conversion.tensors,
        conversion.produce,
        source.folder,
        config.max_shard_size,
        leave_out=without if config.tower == "same" else PICTURE_FILES,
    )
    console.line(f"Wrote {len(conversion.tensors):,} tensors to {target} ({conversion.architecture.model_type}).")
    if job is None:
        return 0
    if config.processes == 1:
        damage.run_worker(config)
        return 0
    return run_beside("moexpand.train.damage", config, config.processes, damage.result_folder(config), LAUNCHED)


def changes_of(config: ConvertCommand, source: Checkpoint) -> Changes:
    """The changes that the keys ask for."""
    tower: VisionArchitecture | None = None
    if config.tower == "fresh":
        arch = source.architecture
        deepstack = config.family == "same" and bool(arch.mrope_section)
        told = config.vision.image_token_id
        # the source's own token, unless another than the default is given
        own = arch.vision is not None and told == VisionModel.image_token_id
        token = arch.vision.image_token_id if arch.vision is not None and own else told
        tower = fresh_tower(config.vision, arch.hidden_size, arch.num_hidden_layers, deepstack, token, arch.vocab_size, "vision")
    else:
        for given in changed(config.vision, "vision"):
            raise InputError(f"{given} is the size of a fresh tower; give tower=fresh as well, or leave it out.")
    return Changes(
        family=config.family,
        fope=config.positions == "fope",
        compensate=config.compensate,
        fope_init_factor=config.fope_init_factor,
        fope_sep_head=config.fope_sep_head,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_position_embeddings,
        tower=tower,
        encoder=_encoder_of(config, source),
        seed=config.seed,
    )


def _encoder_of(config: ConvertCommand, source: Checkpoint) -> str | TimeSeriesArchitecture:
    if config.encoder == "fresh":
        arch, heard = source.architecture, config.time_series
        if arch.time_series is not None and heard.ts_token_id == TimeSeriesModel.ts_token_id:
            heard = replace(heard, ts_token_id=arch.time_series.ts_token_id)  # the source's own, unless another is given
        return fresh_encoder(heard, arch.hidden_size, arch.vocab_size, "time_series")
    for given in changed(config.time_series, "time_series"):
        raise InputError(f"{given} is the size of a fresh encoder of time series; give encoder=fresh as well, or leave it out.")
    return config.encoder


def _announce(console: Console, conversion: Conversion) -> None:
    source, arch = conversion.source, conversion.architecture
    console.line(f"{source.folder}: {source.architecture.model_type} -> {arch.model_type}.")
    left = Counter(map(part_of, conversion.left_out))
    if left:
        told = ", ".join(f"{count} of {part}" for part, count in left.items())
        console.line(f"Left out are {left.total()} tensors: {told}.")
    if conversion.changes.tower is not None:
        console.line(
            f"The vision tower is fresh (seed {conversion.changes.seed}): train it first, with vision.freeze=[decoder] or "
            "vision.warmup_steps."
        )
    if conversion.changes.encoder not in ("same", "none"):
        console.line(f"The encoder of time series is fresh (seed {conversion.changes.seed}).")
    if conversion.changes.fope:
        half = arch.head_dim // 2
        scaled = "scaled so that they count as before" if conversion.changes.compensate else "which count twice now"
        console.line(
            f"FoPE keeps {arch.fope_frequencies} of {half} frequencies (those above one turn in {arch.max_position_embeddings:,} "
            f"positions) and leaves {half - arch.fope_frequencies} pairs unturned, {scaled}."
        )
