"""Exact parameter counts from shapes: by part, in all, and active per token.

A token's forward pass touches everything but the experts that it does not visit, so active = all - experts * (1 - K / E). The
embedding table is a look-up of one row; write-ups differ on whether to count it, so both figures are given.
"""

import difflib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.config_json import read_architecture
from moexpand.upcycle.families import expected_tensors, part_of
from moexpand.upcycle.presets import PRESETS

PARTS = ("embedding", "attention", "router", "experts", "norms", "head")


@dataclass(frozen=True)
class Count:
    """Numbers of parameters.

    Attributes:
        parts: by part of the model; a head that shares the embedding's weights counts 0.
        active_parts: of each part, what one token's forward pass uses; the embedding table in full.
        active_without_embedding: the embedding table left out, unless the head multiplies with it.
    """

    parts: dict[str, int]
    active_parts: dict[str, int]
    total: int
    active: int
    active_without_embedding: int


def shape_of(model: str) -> Architecture:
    """The shape of a checkpoint folder, a config.json or a preset's name (upper or lower case).

    Raises:
        InputError: it is none of these; a folder's tensors contradict its config.
    """
    path = Path(model)
    if path.is_dir():
        return open_checkpoint(path).architecture if any(path.glob("*.safetensors*")) else _of_config(path / "config.json")
    if path.is_file():
        return _of_config(path)
    names = {name.lower(): name for name in PRESETS}
    if model.lower() not in names:
        near = difflib.get_close_matches(model.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else f"presets are {', '.join(PRESETS)}."
        raise InputError(f"{model} is no folder, no config.json and no preset; {hint}")
    return PRESETS[names[model.lower()]]


def count(arch: Architecture) -> Count:
    """Count the parameters of a model of this shape."""
    counter: Counter[str] = Counter()
    for name, shape in expected_tensors(arch).items():
        counter[part_of(name)] += math.prod(shape)
    parts = {part: counter[part] for part in PARTS}
    active = parts | {"experts": parts["experts"] // arch.num_experts * arch.num_experts_per_tok}
    without = sum(active.values()) - (0 if arch.tie_word_embeddings else active["embedding"])
    return Count(parts, active, sum(parts.values()), sum(active.values()), without)


def _of_config(path: Path) -> Architecture:
    return read_architecture(read_json(path), str(path))
