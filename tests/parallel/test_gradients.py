"""Every gradient of a step is the same on every layout, for every gradient of the router and both scopes of the balance loss."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel import runs
from tests.parallel.layouts import FOUR, GROUPED_FOUR, GROUPED_TWO, TWO
from tests.parallel.runs import Job, relative
from tests.processes import run_on_ranks

LOSSES = {"balance_coefficient": 1e-2, "group_coefficient": 1e-2, "z_loss_coefficient": 1e-3}
RULES = LOSSES | {"gradient": "ste"}
BOUND = 1e-5


def _due(folder: Path, rules: dict[str, Any]) -> tuple[dict[str, np.ndarray], runs.Row]:
    ((blocks, row),) = runs.gradient_blocks([Job(folder, {}, rules)])
    return runs.merged([blocks]), row


def _stacked(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a layer together, as the engine holds them: the gradient of one with few tokens is little but rounding."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in gradients.items():
        found.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


def _worst(found: dict[str, np.ndarray], due: dict[str, np.ndarray]) -> tuple[float, str]:
    assert found.keys() == due.keys()
    for name, values in found.items():
        assert not np.isnan(values).any(), f"no rank holds all of {name}"
    mine, theirs = _stacked(found), _stacked(due)
    return max((relative(mine[name], theirs[name]), name) for name in theirs)


def _check(folder: Path, size: int, layouts: dict[str, dict[str, Any]], rules: dict[str, Any]) -> None:
    due, due_row = _due(folder, rules)
    answers = run_on_ranks(runs.gradient_blocks, size, [Job(folder, layout, rules) for layout in layouts.values()], timeout=800)
    far = {}
    for number, name in enumerate(layouts):
        worst = _worst(runs.merged([answer[number][0] for answer in answers]), due)
        loss, norm = answers[0][number][1].loss, answers[0][number][1].grad_norm
        if worst[0] > BOUND or abs(loss - due_row.loss) > BOUND * due_row.loss or abs(norm - due_row.grad_norm) > BOUND * norm:
            far[name] = (worst, loss, norm)
    assert not far, (far, due_row.loss, due_row.grad_norm)


@pytest.mark.layouts
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "layouts"), [(2, TWO), (4, FOUR)], ids=["two ranks", "four ranks"])
def test_every_gradient_of_a_parent_is_that_of_one_rank(deep_parent: Path, size: int, layouts: dict[str, Any]) -> None:
    _check(deep_parent, size, layouts, RULES)


@pytest.mark.layouts
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "layouts"), [(2, GROUPED_TWO), (4, GROUPED_FOUR)], ids=["two ranks", "four ranks"])
def test_every_gradient_of_a_grouped_child_is_that_of_one_rank(deep_child: Path, size: int, layouts: dict[str, Any]) -> None:
    _check(deep_child, size, layouts, RULES)


@pytest.mark.parametrize(
    "rules",
    [
        LOSSES | {"gradient": "topk", "scope": "global"},
        LOSSES | {"gradient": "ste", "normalised": True, "temperature": 0.5, "layer_factors": (2.0, 0.0, 1.0, 0.5)},
    ],
    ids=["topk, global", "normalised ste, factors"],
)
def test_other_rules_have_the_same_gradients_on_every_layout(deep_child: Path, rules: dict[str, Any]) -> None:
    layouts = {"TP2 EP2": {"tensor": 2, "expert": 2}, "CP2": {"context": 2}} | {
        name: GROUPED_TWO[name] for name in ("EP2 grouped_allgather", "ETP2 grouped_allgather")
    }
    _check(deep_child, 2, layouts, rules)
