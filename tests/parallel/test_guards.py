"""A step whose gradients are not finite changes nothing: weights, moments and Adam's step count stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs


def _weights(built: Any) -> dict[str, np.ndarray]:
    return {name: tensor.clone().numpy() for name, tensor in built.tensors()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_step_is_skipped_and_the_run_goes_on_as_if_it_had_not_been(parent: Path, poison: float) -> None:
    with runs.engine(parent, {}, {"gradient": "ste"}) as built:
        due = runs.train(runs.prepare(built), 0, 3)
    with runs.engine(parent, {}, {"gradient": "ste"}) as built:
        runs.prepare(built)
        found = runs.train(built, 0, 2)
        before, norm = _weights(built), built.stages[-1].decoder.final_layernorm.weight
        kept = norm.data.clone()
        norm.data[0] = poison
        report = built.step(runs.device_batches(built, 2), 1e-3)
        assert report.skipped
        assert not np.isfinite(report.grad_norm)
        norm.data.copy_(kept)
        assert all(np.array_equal(value, before[name]) for name, value in _weights(built).items())
        assert found + runs.train(built, 2, 3) == due


def test_a_whole_step_is_not_called_skipped(parent: Path) -> None:
    with runs.engine(parent, {}, {}) as built:
        before = _weights(runs.prepare(built))
        report = built.step(runs.device_batches(built, 0), 1e-3)
        assert not report.skipped
        moved = {name: np.abs(value - before[name]).max() for name, value in _weights(built).items()}
        assert moved["model.embed_tokens.weight"] > 1e-4
        assert torch.isfinite(torch.tensor(list(moved.values()))).all()
