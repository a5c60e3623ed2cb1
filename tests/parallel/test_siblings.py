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


def after_a_step(folder: Path, layouts: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """Similarities right after a step that moves the weights far, and after one more step to see that the run goes on."""
    from moexpand.parallel.siblings import similarities

    found = []
    for layout in layouts:
        with runs.engine(folder, layout, {"gradient": "ste"}, "fp64") as built:
            runs.prepare(built)
            parents = {layer: torch.arange(128) % 32 for layer in built.routed_layers}
            for first in range(2):
                runs.train(built, first, first + 1, lr=0.1)
                figures = similarities(built, parents)
                found.append({name: values.tolist() for name, values in figures.items()})
    return found


def test_they_are_those_of_the_step_that_was_just_made_also_where_weights_are_gathered_late(deep_child: Path) -> None:
    """`parallel.overlap` leaves most of a step's new weights on other ranks until the next forward pass."""
    due = after_a_step(deep_child, [{}])
    moved = [abs(one - two) for name in due[0] for one, two in zip(due[0][name], due[1][name], strict=True)]
    assert min(moved) > 1e-4, "the bound tells a step from the next"
    for found in run_on_ranks(after_a_step, 2, deep_child, [{"overlap": True}, {"expert": 2, "overlap": True}]):
        for number, figures in enumerate(found):
            for name in ("weights", "router"):
                assert figures[name] == pytest.approx(due[number % 2][name], abs=1e-6), (number, name)
