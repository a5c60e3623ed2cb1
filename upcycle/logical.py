"""A model as the engine reads it, tensor by tensor and each expert's matrix for itself, wherever its bytes come from:

a checkpoint folder of any layout, or a parent and the plan of a child that has never been written.
"""

import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import CONFIG, Checkpoint, read_range
from moexpand.upcycle.families import family_of
from moexpand.upcycle.family import SCALE, Config
from moexpand.upcycle.matrices import read_matrix
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.series_encoder import PLACES
from moexpand.upcycle.tensors import BLOCK, expected_tensors

if TYPE_CHECKING:
    import torch

TOWER_ACTIVATION = "gelu_pytorch_tanh"

EXPERT_NAME = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)$")


Reader = Callable[[str, slice | None], "torch.Tensor"]
"""Reads a stored tensor by name, or a range of its rows."""


class Weights(Protocol):
    """The tensors of a model by the names of split files."""

    folder: Path
    """Where the bytes lie, and the side files."""
    side_files: list[Path]
    """Those that go with the model, relative to `folder`; no tokenizer when the model has another vocabulary."""
    config: Config
    architecture: Architecture

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the model."""

    def read_torch(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """A tensor, or a contiguous range of its rows, on the CPU; reads no other expert's bytes.

        In its stored dtype; block-FP8 weights times their scales, in fp32.
        """

    def order(self, name: str) -> tuple[int, ...]:
        """Key to sort by, stably, when many tensors are to be read: those that come from the same bytes follow each other."""


class StoredWeights:
    """The model of a checkpoint folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.folder, self.side_files = checkpoint.folder, list(checkpoint.side_files)
        self.config, self.architecture = checkpoint.config, checkpoint.architecture

    @cached_property
    def names(self) -> list[str]:
        return list(model_tensors(self.architecture, self.config))

    def read_torch(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        return _unscaled(self.checkpoint, self._read, name, rows)

    def _read(self, name: str, rows: slice | None) -> "torch.Tensor":
        expert = expert_of(name)
        if expert is None:
            return self.checkpoint.read_torch(name, rows)
        return as_torch(read_matrix(self.checkpoint, *expert)[rows or slice(None)])

    def order(self, name: str) -> tuple[int, ...]:
        return ()


class ExpandedWeights:
    """The model of the child that a recipe describes, made while it is read; it equals the written child bit for bit.

    The parent's expert that was read last is kept, so whoever reads by `order` reads each expert that it needs once.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.parent = recipe, recipe.parent
        self.folder, self.side_files = recipe.parent.folder, recipe.kept_side_files
        self.config, self.architecture = recipe.config, recipe.architecture
        self._routers = {recipe.family.router_name(layer): layer for layer in self.architecture.moe_layers}
        self._read = lru_cache(maxsize=len(recipe.matrices))(read_unchangeable)

    @cached_property
    def names(self) -> list[str]:
        return list(model_tensors(self.architecture, self.config))

    def read_torch(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        return _unscaled(self.parent, self._read_one, name, rows)

    def _read_one(self, name: str, rows: slice | None) -> "torch.Tensor":
        expert, family = expert_of(name), self.recipe.family
        if expert is not None:
            layer, slot, matrix = expert
            return as_torch(self.recipe.matrix(layer, slot, matrix, self._read)[rows or slice(None)])
        if name in self._routers:
            return as_torch(self.recipe.router(self._routers[name])[rows or slice(None)])
        if self.recipe.plan.vocabulary is not None and name in (family.embedding_name(), family.head):
            start, stop, _ = (rows or slice(None)).indices(self.architecture.vocab_size)
            return as_torch(self.recipe.vocabulary_rows(name, start, stop))
        return self.parent.read_torch(name, rows)

    def order(self, name: str) -> tuple[int, ...]:
        expert = expert_of(name)
        return (-1,) if expert is None else (expert[0], self.recipe.plan.slot_to_parent[expert[0]][expert[1]])


def _unscaled(checkpoint: Checkpoint, read: Reader, name: str, rows: slice | None) -> "torch.Tensor":
    """A tensor, or a range of its rows; block-FP8 weights times their scales, in fp32."""
    expert = expert_of(name)
    values = read(name, rows)
    if not checkpoint.quantised(name if expert is None else expert[2]):
        return values
    from moexpand.base.block_fp8 import WEIGHTS, dequantise

    start = 0 if rows is None else rows.start or 0
    scales = read(name + SCALE, slice(start // BLOCK, -(-(start + len(values)) // BLOCK)))
    return dequantise(values, scales, WEIGHTS, before=start % BLOCK)


def read_unchangeable(file: Path, start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of a file that several tensors may be made of."""
    return memoryview(read_range(file, start, stop)).toreadonly()


def expert_of(name: str) -> tuple[int, int, str] | None:
    """Layer, expert and matrix that a tensor of a split file holds; None for all others."""
    found = EXPERT_NAME.search(name)
    return None if found is None else (int(found[1]), int(found[2]), found[3])


def as_torch(array: np.ndarray) -> "torch.Tensor":
    """A tensor of the same dtype; bf16 and fp8 of ml_dtypes become torch's."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.kind != "V" and not array.dtype.name.startswith(("bfloat", "float8")):
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    bits = array.view(np.uint16 if array.itemsize == 2 else np.uint8)
    return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(getattr(torch, array.dtype.name))


def model_tensors(architecture: Architecture, config: Config) -> dict[str, Shape]:
    """Name and shape of everything that the engine keeps of a model: decoder, tower, tables of positions."""
    family = family_of(architecture.model_type)
    own = expected_tensors(architecture)
    return own | family.carried(config, CONFIG) | family.buffers(config, CONFIG)


def unsupported(checkpoint: Checkpoint) -> str:
    """What of a checkpoint no forward pass here computes; empty when there is nothing."""
    arch, family = checkpoint.architecture, checkpoint.family
    if arch.rope_type != "default":
        return f"rope_type={arch.rope_type}; the engine computes plain rotary embedding (default) alone"
    if arch.sliding_window is not None:
        return f"sliding_window={arch.sliding_window}; the engine computes full attention alone"
    if len(arch.moe_layers) < arch.num_hidden_layers:
        return "layers without experts (mlp_only_layers, decoder_sparse_step); the engine computes layers with experts alone"
    if family.text and arch.vision is None:
        return f"model_type={arch.model_type}, whose vision tower the engine does not compute"
    if arch.vision is not None and arch.vision.hidden_act != TOWER_ACTIVATION:
        return f"hidden_act={arch.vision.hidden_act} in vision_config; the engine computes {TOWER_ACTIVATION} alone"
    kept = model_tensors(arch, checkpoint.config)
    for name in family.buffers(checkpoint.config, CONFIG):
        if name not in checkpoint.tensors:
            return f"no {name}, a table of its position embedding"
    if arch.time_series is not None and arch.time_series.out_hidden_size != arch.hidden_size:
        return f"out_hidden_size={arch.time_series.out_hidden_size} in ts_config and hidden_size={arch.hidden_size}"
    for name in checkpoint.tensors:
        if name.startswith(family.free) and name not in kept and name != PLACES:
            return f"{name}, which the engine has no place for: its config.json has no ts_config that describes it"
    return ""
