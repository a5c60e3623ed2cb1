"""Similarity of siblings equals cosines computed from whole weights, on one rank and on several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs
from tests.processes import run_on_ranks


def compared(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """Similarities at step 0 and after three steps, on each layout; experts are told to be copies of the expert modulo 32."""
    from moexpand.parallel.siblings import similarities
    from moexpand.parallel.watch import RouterWatch

    found = []
    for layout in layouts:
        with runs.engine(folder, layout, {"gradient": "ste"}, "fp32") as built:
            runs.prepare(built)
            parents = {layer: torch.arange(128) % 32 for layer in built.routed_layers}
            runs.train(built, 0, 3, lr=1e-2)
            watch = RouterWatch(probe=4)
            built.step(runs.device_batches(built, 3), 0.0, watch=watch)
            figures = similarities(built, parents, watch.probes)
            found.append({name: values.tolist() for name, values in figures.items()})
    return found


def _mean_cosine(rows: np.ndarray) -> float:
    units = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    cosines = units @ units.T
    return float((cosines.sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def test_cosines_are_those_of_the_whole_weights(deep_child: Path) -> None:
    from moexpand.parallel.siblings import family_cosine

    vectors = np.random.default_rng(0).normal(size=(12, 7))
    due = np.mean([_mean_cosine(vectors[parent::3]) for parent in range(3)])
    assert float(family_cosine(torch.tensor(vectors), torch.arange(12) % 3)) == pytest.approx(due, abs=1e-12)
    assert float(family_cosine(torch.ones(4, 5), torch.zeros(4, dtype=torch.int64))) == pytest.approx(1.0, abs=1e-12)


def test_every_layout_finds_the_same_similarities(deep_child: Path) -> None:
    (due,) = compared(deep_child, [{}])
    assert all(-1 <= value <= 1 for values in due.values() for value in values)
    layouts = [
        {"expert": 2},
        {"expert_tensor": 2},
        {"pipeline": 2},
        {"tensor": 2, "expert": 2, "dispatcher": "grouped_allgather"},
    ]
    for layout, found in zip(layouts, run_on_ranks(compared, 2, deep_child, layouts)[0], strict=True):
        for name in ("weights", "router"):
            assert found[name] == pytest.approx(due[name], abs=1e-3), (layout, name)
        assert all(-1 <= value <= 1 for value in found["outputs"]), layout
