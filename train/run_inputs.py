"""How pictures and time series of a run reach its model: the model's own settings, or the run's; nothing here imports torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import read_json, write_json
from moexpand.conf.data_schema import Pictures, Seen
from moexpand.data.images import ImageSettings
from moexpand.upcycle.architecture import Architecture, VisionArchitecture
from moexpand.upcycle.checkpoint import CONFIG
from moexpand.upcycle.config_json import read_architecture

SETTINGS, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def architecture_of(checkpoint: str) -> Architecture:
    """The architecture of a checkpoint folder, from its config.json alone."""
    file = Path(checkpoint) / CONFIG
    return read_architecture(read_json(file), str(file))


def hears(seen: Seen, encoder: bool) -> bool:
    """Whether the time series of the shards are read, for a model with an encoder or without.

    Raises:
        InputError: they are turned off for a model that takes none anyway.
    """
    if not encoder and seen.time_series == "off":
        raise InputError(
            "data.time_series=off is for a model with an encoder of time series and this one has none; leave it out."
        )
    return encoder and seen.time_series == "auto"


def image_settings(pictures: Pictures, vision: VisionArchitecture | None, checkpoint: str | None) -> ImageSettings | None:
    """The settings, or None where pictures are left out.

    Raises:
        InputError: the checkpoint's settings do not fit its tower, or limits are given for pictures that are left out.
    """
    given: dict[str, Any] = {"min_pixels": pictures.min_pixels, "max_pixels": pictures.max_pixels}
    if vision is None or pictures.images == "off":
        for name, value in given.items():
            if value is not None:
                why = "data.images=off leaves them out" if vision is not None else "this model has no vision tower"
                raise InputError(f"data.{name}={value} is for pictures and {why}; leave it out.")
        return None
    due: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    settings = ImageSettings(**due)
    if checkpoint is not None and _has_settings(Path(checkpoint)):
        settings = ImageSettings.from_checkpoint(checkpoint)
        for name, value in due.items():
            if getattr(settings, name) != value:
                raise InputError(
                    f"{checkpoint} has {name} {getattr(settings, name)} for its pictures and {value} for its vision tower; "
                    f"correct its {SETTINGS} or {CONFIG}."
                )
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def write_settings(settings: ImageSettings, folder: Path) -> None:
    """Let a folder's own files say these settings, where they say others or none."""
    if _has_settings(folder):
        if ImageSettings.from_checkpoint(folder) == settings:
            return
        if (folder / PROCESSOR).is_file():
            kept = {name: value for name, value in read_json(folder / PROCESSOR).items() if name != "image_processor"}
            write_json(folder / PROCESSOR, kept)
    write_json(folder / SETTINGS, settings.to_fields())


def _has_settings(folder: Path) -> bool:
    if (folder / PROCESSOR).is_file() and read_json(folder / PROCESSOR).get("image_processor") is not None:
        return True
    return (folder / SETTINGS).is_file()
