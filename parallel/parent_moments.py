"""Adam's moments of a parent's run as those that its child begins with: read from the parent's checkpoint, expert by expert.

Each rank reads what it holds, on any layout, from memory-mapped files. A child's experts and router rows take the moments of the
parents that their slots copy.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moexpand.base.errors import InputError
from moexpand.parallel import checkpoint, cpu, optimizer_state
from moexpand.parallel.checkpoint_reader import Reader
from moexpand.parallel.engine import Engine

BY_EXPERT = (".mlp.experts.", ".mlp.router.weight")
"""In names of tensors [layers, experts, ...]."""

BY_TOKEN = ("embedding.word_embeddings.", "output_layer.")
"""In names of tensors whose rows are tokens; another vocabulary has other rows."""

Map = Sequence[Sequence[int]]
"""Of each decoder layer, the parent of every expert."""


def inherit(engine: Engine, folder: Path, maps: Map | None, scale: bool) -> list[str]:
    """Fill the moments of a new engine from a checkpoint of its parent's run.

    Args:
        engine: prepared for training, before its first step.
        folder: the checkpoint.
        maps: by which the child was made; None where it has the parent's own experts. A checkpoint with as many experts as
            the child, and not as many as the parent, is of the child itself.
        scale: of an expert that was copied c times, the first moment is divided by c and the second by c squared: as if each
            copy saw a c-th of its parent's tokens. Otherwise they are copied.

    Returns:
        What was left at zero, a line each.

    Raises:
        InputError: the checkpoint is of another model; the sentence names a tensor and both shapes.
    """
    cpu.enable()
    stored = _Stored(folder)
    optimizer_state.initialise(engine.optimizer)
    pieces = optimizer_state.sharded(engine.optimizer, checkpoint.state_of_model(engine))
    left: dict[str, str] = {}
    for piece in pieces.values():
        name = next((each for each in optimizer_state.MOMENTS if piece.key.startswith(f"{optimizer_state.PREFIX}.{each}.")), None)
        if name is None:
            continue  # a master weight
        why = _fill(piece, stored, maps, 0 if not scale else 1 + optimizer_state.MOMENTS.index(name))
        if why:
            left[piece.key.removeprefix(f"{optimizer_state.PREFIX}.{name}.")] = why
    optimizer_state.set_adam_step(engine.optimizer, stored.adam_step)
    return [f"note: the moments of {key} begin at zero: {why}" for key, why in sorted(left.items())]


def _fill(piece: ShardedTensor, stored: "_Stored", maps: Map | None, power: int) -> str:
    """Fill one box of a moment; returns why it is left at zero, empty when it is not."""
    table = stored.tables.get(piece.key)
    if table is None:
        return "the parent's checkpoint has none"
    due, found = tuple(piece.global_shape), tuple(table.size)
    if any(each in piece.key for each in BY_EXPERT) and maps is not None and found[1] == parents_of(maps):
        if due[:1] + due[2:] != found[:1] + found[2:]:
            raise _other_model(piece.key, found, due)
        _fill_experts(piece, stored, maps, power)
        return ""
    if due == found:
        stored.read(piece.key, piece.global_offset, piece.data)
        return ""
    if any(each in piece.key for each in BY_TOKEN) and due[1:] == found[1:]:
        return f"the parent has {found[0]:,} tokens and the child {due[0]:,}"
    raise _other_model(piece.key, found, due)


def parents_of(maps: Map) -> int:
    """How many experts the parent has: every one of them is copied."""
    return max(map(max, filter(None, maps)), default=-1) + 1


def _fill_experts(piece: ShardedTensor, stored: "_Stored", maps: Map, power: int) -> None:
    """A box [layers, experts, ...], each expert from its parent's."""
    layer_0, expert_0, *rest = piece.global_offset
    for layer in range(piece.local_shape[0]):
        parents = maps[layer_0 + layer]
        copies = Counter(parents)
        for expert in range(piece.local_shape[1]):
            parent = parents[expert_0 + expert]
            target = piece.data[layer : layer + 1, expert : expert + 1]
            stored.read(piece.key, (layer_0 + layer, parent, *rest), target)
            if power:
                target /= copies[parent] ** power


def _other_model(key: str, found: tuple[int, ...], due: tuple[int, ...]) -> InputError:
    return InputError(f"The moments of optim.moments_from are of another model: {key} is {found} there and {due} here.")


class _Stored:
    """A checkpoint's tensors, to be read by place."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self._folder = folder
        metadata = self._reader.read_metadata()
        self._reader.storage_data = metadata.storage_data
        self.tables = {
            name: each for name, each in metadata.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)
        }
        self.adam_step = float(dist_checkpointing.load_common_state_dict(str(folder))["extra"]["adam_step"])
        self._mapped = lru_cache(maxsize=64)(self._map)  # neighbouring experts lie in one box
        self._by_first: dict[str, dict[int, list[Any]]] = {}
        """Stored boxes by name and first index, with which all boxes of a layer begin."""
        self._places = {(index.fqn, tuple(index.offset)): place for index, place in metadata.storage_data.items() if index.offset}

    def read(self, key: str, offset: Sequence[int], target: torch.Tensor) -> None:
        """Copy the box that begins at `offset` into a tensor of its sizes."""
        filled = 0
        for chunk in self._near(key, offset[0], target.shape[0]):
            spans = [
                (max(want, have), min(want + wide, have + size))
                for want, wide, have, size in zip(offset, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in spans):
                continue
            source = self._mapped(key, tuple(chunk.offsets), tuple(chunk.sizes))[
                tuple(slice(a - o, b - o) for (a, b), o in zip(spans, chunk.offsets, strict=True))
            ]
            target[tuple(slice(a - o, b - o) for (a, b), o in zip(spans, offset, strict=True))].copy_(torch.from_numpy(source))
            filled += source.size
        assert filled == target.numel(), f"{self._folder} does not hold all of {key}"

    def _near(self, key: str, first: int, count: int) -> Iterator[Any]:
        if key not in self._by_first:
            self._by_first[key] = defaultdict(list)
            for chunk in self.tables[key].chunks:
                self._by_first[key][chunk.offsets[0]].append(chunk)
        for start, chunks in self._by_first[key].items():
            if start < first + count:
                yield from (chunk for chunk in chunks if start + chunk.sizes[0] > first)

    def _map(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
        place = self._places[key, offsets]
        beginning, _ = self._reader.data_of(place)
        # Copy-on-write, since torch wants arrays that could be written.
        return np.memmap(self._folder / place.relative_path, np.float32, "c", beginning, sizes)
