"""Calibration folders written by hand: the router logits of a parent, counted a token at a time."""

from pathlib import Path

import numpy as np

from moexpand.upcycle.calibration import LayerCounts, Origin, write_calibration
from moexpand.upcycle.checkpoint import open_checkpoint
from tests import closed_form


def routed(parent: Path, tokens: np.ndarray, top_k: int) -> dict[int, np.ndarray]:
    """Router logits [T, E] of every layer of a parent, float32, on its own hidden states."""
    seen: dict[int, list[np.ndarray]] = {}

    def recorder(layer: int) -> closed_form.Pick:
        plain = closed_form.top_pick(top_k)

        def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            seen.setdefault(layer, []).append(logits)
            return plain(logits)

        return pick

    layers = open_checkpoint(parent).architecture.num_hidden_layers
    closed_form.logits(parent, tokens, [recorder(layer) for layer in range(layers)])
    return {layer: np.stack(rows).astype(np.float32) for layer, rows in seen.items()}


def counts_of(logits: np.ndarray, top_k: int) -> LayerCounts:
    """How often experts are visited, in which rank, and which together."""
    experts = logits.shape[1]
    usage, rank, pairs = np.zeros(experts, int), np.zeros((top_k, experts), int), np.zeros((experts, experts), int)
    for row in logits:
        chosen = np.argsort(-row, kind="stable")[:top_k]
        usage[chosen] += 1
        rank[np.arange(top_k), chosen] += 1
        for expert in chosen:
            pairs[expert, [other for other in chosen if other != expert]] += 1
    return LayerCounts(usage, rank, pairs)


def write(folder: Path, parent: Path, logits: dict[int, np.ndarray], top_k: int) -> Path:
    """The calibration that counts exactly these logits of `parent`."""
    tokens, experts = next(iter(logits.values())).shape
    origin = Origin(
        checkpoint=parent.name, parent=open_checkpoint(parent).fingerprint, shards="sha256:1", tokenizer="sha256:2", seed=0,
        seq_length=tokens, sequences=1, tokens=tokens, sample=tokens, num_experts=experts, top_k=top_k, num_groups=1,
        precision="fp32", versions={"moexpand": "0"},
    )  # fmt: skip
    write_calibration(folder, origin, {layer: counts_of(rows, top_k) for layer, rows in logits.items()}, logits)
    return folder
