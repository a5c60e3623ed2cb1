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


def _state(built: Any) -> dict[str, torch.Tensor]:
    """All that a step carries to the next, buffers included."""
    return {name: value.clone() for name, value in built.stages[0].state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_skipped_step_leaves_what_routers_carry_along(parent: Path) -> None:
    """Selection bias, the previous step's load and the default vectors, and the next step goes on as if nothing had been."""
    rules = {"gradient": "default_vector", "bias_rate": 1e-3, "scope": "global", "balance_coefficient": 1e-2}
    shape = {"selection_bias": True}
    with runs.engine(parent, {}, rules, shape=shape) as built:
        due = runs.train(runs.prepare(built), 0, 4)
    with runs.engine(parent, {}, rules, shape=shape) as built:
        runs.prepare(built)
        found = runs.train(built, 0, 2)
        norm = built.stages[-1].decoder.final_layernorm.weight
        before, kept = _state(built), norm.data.clone()
        assert any(name.endswith("selection_bias") and value.any() for name, value in before.items())
        assert any(name.endswith("default_vectors.total") and value.any() for name, value in before.items())
        norm.data[0] = float("nan")
        assert built.step(runs.device_batches(built, 2), 1e-3).skipped
        norm.data.copy_(kept)
        after = _state(built)
        assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
        assert found + runs.train(built, 2, 4) == due


def test_a_whole_step_is_not_called_skipped(parent: Path) -> None:
    with runs.engine(parent, {}, {}) as built:
        before = _weights(runs.prepare(built))
        report = built.step(runs.device_batches(built, 0), 1e-3)
        assert not report.skipped
        moved = {name: np.abs(value - before[name]).max() for name, value in _weights(built).items()}
        assert moved["model.embed_tokens.weight"] > 1e-4
        assert torch.isfinite(torch.tensor(list(moved.values()))).all()
