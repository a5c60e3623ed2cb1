"""A model as users name it: a checkpoint folder, a config.json, a preset, or the expansion of a preset (`Qwen3-30B-A3B-x4`)."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import CONFIG, Checkpoint, open_checkpoint
from moexpand.upcycle.config_json import grouped_config, read_architecture, text_config
from moexpand.upcycle.families import PRESETS, family_of
from moexpand.upcycle.family import Config, Family
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.tensors import stored_tensors

GROUPS = 8
"""Groups of a preset's expansion, those of Intern-S1-Pro."""


@dataclass(frozen=True)
class Model:
    """A model whose shapes are known; its weights may be anywhere or nowhere."""

    name: str
    """As it was given."""
    kind: str
    """`folder`, `config` (a folder without weights as well) or `preset`."""
    config: Config
    architecture: Architecture
    """Of its decoder."""
    checkpoint: Checkpoint | None = None
    """The opened folder, where there are weights."""

    @property
    def family(self) -> Family:
        """Names and shapes of its kind."""
        return family_of(self.architecture.model_type)

    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor: those in a folder's files, or else those that the config calls for."""
        if self.checkpoint is not None:
            return {name: info.shape for name, info in self.checkpoint.tensors.items()}
        decoder = stored_tensors(self.architecture, self.family.experts_layout)
        return decoder | self.family.carried(self.config, self.name) | self.family.buffers(self.config, self.name)


def find_model(name: str) -> Model:
    """The model of a name: what lies at that path, or else a preset, in upper or lower case.

    `PRESET-xN` is the expansion of a preset without groups to N times as many experts in 8 groups.

    Raises:
        InputError: there is none; a config describes no known model; a folder's tensors contradict its config.
    """
    path = Path(name)
    if os.path.isdir(name) and any(path.glob("*.safetensors*")):
        checkpoint = open_checkpoint(path)
        return Model(name, "folder", checkpoint.config, checkpoint.architecture, checkpoint)
    if os.path.isdir(name) or os.path.isfile(name):
        file = path / CONFIG if path.is_dir() else path
        config = read_json(file)
        return Model(name, "config", config, read_architecture(config, str(file)))
    config = _preset(name)
    return Model(name, "preset", config, read_architecture(config, name))


def _preset(name: str) -> Config:
    presets = {preset.lower(): config for preset, config in PRESETS.items()}
    if name.lower() in presets:
        return presets[name.lower()]
    expansion = re.fullmatch(r"(.+)-x([2-9]|[1-9]\d{1,3})", name.lower())
    if expansion and expansion[1] in presets:
        config = presets[expansion[1]]
        arch = read_architecture(config, name)
        if arch.router_n_groups == 1:
            return grouped_config(config, arch.num_experts * int(expansion[2]), GROUPS)
    raise InputError(f"{name} is no folder, no config.json and no preset; {_nearest(name)}")


def _nearest(name: str) -> str:
    plain = [
        preset
        for preset, config in PRESETS.items()
        if not text_config(config, family_of(config["model_type"])).get("router_n_groups")
    ]
    names = {known.lower(): known for known in (*PRESETS, *(f"{preset}-x4" for preset in plain))}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"did you mean {names[near[0]]}?" if near else f"presets are {', '.join(names.values())}."
