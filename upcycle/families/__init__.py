"""Every family of checkpoints that is read and written, one file each; a file that stands here adds its families."""

import importlib
import pkgutil

from moexpand.base.errors import InputError
from moexpand.upcycle.family import Config, Family


def _modules() -> list[object]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


FAMILIES: dict[str, Family] = {family.model_type: family for module in _modules() for family in getattr(module, "FAMILIES", ())}
"""By `model_type` of config.json."""

PRESETS: dict[str, Config] = {name: config for module in _modules() for name, config in getattr(module, "PRESETS", {}).items()}
"""config.json of published models, by name."""


def family_of(model_type: object, where: str = "config.json") -> Family:
    """The family of a config's `model_type`; an unknown one is an `InputError`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where} describes {model_type!r}, not a known Mixture-of-Experts model; known are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
