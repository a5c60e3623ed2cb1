"""Exact parameter counts from shapes: by part, in all, and active per token; and what the files of a folder hold.

A token of text passes through everything in the decoder but the experts that it does not visit, so
active = decoder - experts * (1 - K / E). The embedding table is a look-up of one row; write-ups differ on whether to count it, so
both figures are given. Towers (vision, time series) see images and signals, no text: they are in the total and not in active.
"""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.family import SCALE, part_of
from moexpand.upcycle.models import Model

BF16 = 2
"""Bytes of a number."""

TEXT = ("embedding", "attention", "router", "experts", "dense", "norms", "head")
"""Parts of a decoder; `dense` is what stands in place of experts in layers without them."""

TOWERS = ("vision", "time_series")
PARTS = TEXT + TOWERS


@dataclass(frozen=True)
class Layers:
    """Layers with equal shapes.

    Attributes:
        layers: their numbers.
        parts: parameters of one of them, by part.
        total: their sum.
    """

    layers: list[int]
    parts: dict[str, int]
    total: int


@dataclass(frozen=True)
class Count:
    """Numbers of parameters.

    Attributes:
        parts: by part of the model, `PARTS`; a head that shares the embedding's weights counts 0.
        active_parts: of each part, what one token of text uses; the embedding table in full.
        subtotals: of the decoder (`text`) and of each of `TOWERS`.
        total: of everything that is a parameter.
        active: sum of `active_parts`.
        active_without_embedding: the embedding table left out, unless the head multiplies with it.
        buffers: numbers in tensors that are saved and not trained (tables of FoPE); in no other figure.
        per_expert: of one expert.
        layers: the kinds of layers.
    """

    parts: dict[str, int]
    active_parts: dict[str, int]
    subtotals: dict[str, int]
    total: int
    active: int
    active_without_embedding: int
    buffers: int
    per_expert: int
    layers: list[Layers]


@dataclass(frozen=True)
class Stored:
    """What the files of a folder hold.

    Attributes:
        tensors, shards: how many there are.
        nbytes: bytes of the tensors.
        experts_layout: `split` or `fused`.
        dtypes: tensors, numbers in them and bytes, by dtype.
        scales: numbers in the scales of block-FP8 weights, which are no parameters.
    """

    tensors: int
    shards: int
    nbytes: int
    experts_layout: str
    dtypes: dict[str, dict[str, int]]
    scales: int


def count(model: Model) -> Count:
    """Count the parameters of a model."""
    arch = model.architecture
    layer_number = re.compile(re.escape(model.family.layer_name(0, "")).replace(r"layers\.0\.", r"layers\.(\d+)\."))
    whole: Counter[str] = Counter()
    by_layer: list[Counter[str]] = [Counter() for _ in range(arch.num_hidden_layers)]
    for name, shape in model.shapes().items():
        if name.endswith(SCALE):
            continue
        part, number = part_of(name), prod(shape)
        whole[part] += number
        if found := layer_number.match(name):
            by_layer[int(found[1])][part] += number
    parts = {part: whole[part] for part in PARTS}
    visited = parts["experts"] // arch.num_experts * arch.num_experts_per_tok
    active = parts | {"experts": visited} | dict.fromkeys(TOWERS, 0)
    table = 0 if arch.tie_word_embeddings else parts["embedding"]
    return Count(
        parts=parts,
        active_parts=active,
        subtotals={"text": sum(parts[part] for part in TEXT)} | {tower: parts[tower] for tower in TOWERS},
        total=sum(parts.values()),
        active=sum(active.values()),
        active_without_embedding=sum(active.values()) - table,
        buffers=whole["buffers"],
        per_expert=parts["experts"] // (arch.num_experts * len(arch.moe_layers)),
        layers=_kinds(by_layer),
    )


def _kinds(by_layer: list[Counter[str]]) -> list[Layers]:
    kinds: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for layer, parts in enumerate(by_layer):
        kinds.setdefault(tuple((part, parts[part]) for part in TEXT if parts[part]), []).append(layer)
    return [Layers(layers, dict(parts), sum(number for _, number in parts)) for parts, layers in kinds.items()]


def stored(checkpoint: Checkpoint) -> Stored:
    """What the files of an opened folder hold, from their headers."""
    dtypes: dict[str, Counter[str]] = {}
    for info in checkpoint.tensors.values():
        dtypes.setdefault(info.dtype, Counter()).update(tensors=1, numbers=prod(info.shape), bytes=info.nbytes)
    return Stored(
        tensors=len(checkpoint.tensors),
        shards=len({info.file for info in checkpoint.tensors.values()}),
        nbytes=checkpoint.nbytes,
        experts_layout=checkpoint.experts_layout,
        dtypes={dtype: dict(numbers) for dtype, numbers in sorted(dtypes.items())},
        scales=sum(prod(info.shape) for name, info in checkpoint.tensors.items() if name.endswith(SCALE)),
    )
