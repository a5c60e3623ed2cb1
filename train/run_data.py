"""The shards of a run, opened as its configuration says; nothing here imports torch."""

from pathlib import Path
from typing import Any

import yaml

from moexpand.base.errors import InputError
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.data.stream import Reading, Source
from moexpand.train.fresh import fresh_architecture
from moexpand.train.run_inputs import architecture_of, hears, image_settings

_ENTRY = "{shards: FOLDER, weight: NUMBER, max_epochs: NUMBER}"


def open_data(config: TrainCommand) -> PackedData:
    """The packed batches of the run's shards.

    Raises:
        InputError: the shards are wrong, or a source would be read more often than it may be.
    """
    arch = fresh_architecture(config.model) if config.checkpoint is None else architecture_of(config.checkpoint)
    data = PackedData(
        sources_of(config.data.shards),
        config.train.seq_length,
        config.train.global_batch,
        config.seed,
        held_out=config.data.held_out,
        tokenizer=config.data.tokenizer,
        max_bad_fraction=config.data.max_bad_fraction,
        reading=Reading(
            shuffle=config.data.shuffle,
            images=image_settings(config.data, arch.vision, config.checkpoint),
            series=hears(config.data, arch.time_series is not None),
            cache=Path(config.data.cache) if config.data.cache else None,
            cache_bytes=int(config.data.cache_gb * 1e9),
            plans=Path(config.run.dir) / "plans",
        ),
    )
    data.check_epochs(config.train.steps)
    return data


def sources_of(shards: str) -> list[Source]:
    """One folder or address, or those of a mixture: a YAML file with a list of {shards, weight, max_epochs}.

    Folders in the file are relative to it. Weights are shares of packs, so of tokens; max_epochs may be left out.

    Raises:
        InputError: the file cannot be read as such a list.
    """
    if not shards.endswith((".yaml", ".yml")):
        return [Source(shards)]
    path = Path(shards)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"data.shards={shards} cannot be read as YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} must hold a list of {_ENTRY}.")
    return [_source(entry, number, path) for number, entry in enumerate(entries)]


def _source(entry: Any, number: int, path: Path) -> Source:
    known = isinstance(entry, dict) and "shards" in entry and set(entry) <= {"shards", "weight", "max_epochs"}
    numbers = [entry.get(name) for name in ("weight", "max_epochs")] if known else []
    positive = all(value is None or (isinstance(value, int | float) and 0 < value < float("inf")) for value in numbers)
    if not known or not isinstance(entry["shards"], str) or not positive:
        raise InputError(f"Entry {number} of {path} is {entry}; it must be {_ENTRY}, with numbers above 0.")
    place = entry["shards"] if "://" in entry["shards"] else str(path.parent / entry["shards"])
    return Source(place, float(entry.get("weight") or 1.0), entry.get("max_epochs"))
