"""Tower, projector and decoder learn at rates of their own, or stay: nothing else about a step changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moexpand.parallel.optimizer import Rates
from tests.parallel import runs, vl_runs
from tests.parallel.vl_runs import LAYERS, VISION, engine_of, saved_state
from tests.processes import run_on_ranks
from tests.upcycle.vl_parent import parent_model

LAYOUTS: list[dict[str, Any]] = [{"tensor": 2, "expert": 2}, {"pipeline": 2}, {"context": 2}, {"overlap": True}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = parent_model(dense=(), num_hidden_layers=LAYERS, vision=VISION)
    return saved_state(model, tmp_path_factory.mktemp("vl") / "state.pt")


def part_of(name: str) -> str:
    if name.startswith(("model.visual.merger.", "model.visual.deepstack_merger_list.")):
        return "projector"
    return "tower" if name.startswith("model.visual.") else "router" if name.endswith(".mlp.gate.weight") else "decoder"


def _blocks(built: Any) -> list[runs.Block]:
    """This rank's parts of all weights."""
    from moexpand.parallel import optimizer, weights

    with optimizer.weights_settled(built.wrapped):
        return [
            (part.name, part.shape, part.rows, part.columns, part.local.clone().numpy())
            for part in weights.parts(built.stages, built.shape)
        ]


def _step(place: Path, layout: dict[str, Any], rates: Rates, frozen: tuple[str, ...] = (), blank: bool = False) -> Any:
    """Weights before and after a step in float64, and the gradients' norm; `blank`: no micro-batch has a picture."""
    micros = [vl_runs.micros()[1]] * 4 if blank else vl_runs.micros()
    with engine_of(place, layout, {"gradient": "ste"}, "fp64") as built:
        runs.prepare(built, clip_grad=0.0, weight_decay=0.1, frozen_parts=frozen)
        before = _blocks(built)
        report = built.step(vl_runs.batches(built, micros), rates)
        return before, _blocks(built), report.grad_norm, report.loss


def _steps(place: Path, frozen: tuple[str, ...], blank: bool) -> list[Any]:
    """The step on every layout."""
    return [_step(place, layout, Rates(1e-3), frozen, blank) for layout in LAYOUTS]


def _on_every_layout(place: Path, frozen: tuple[str, ...], blank: bool = False) -> list[Any]:
    answers = run_on_ranks(_steps, 2, place, frozen, blank)
    return [_whole([answer[number] for answer in answers]) for number in range(len(LAYOUTS))]


def _whole(answers: list[Any]) -> Any:
    before, after = (runs.merged([answer[which] for answer in answers]) for which in (0, 1))
    return before, after, answers[0][2], answers[0][3]


def test_every_part_moves_at_its_own_rate(place: Path) -> None:
    base = Rates(1e-3)
    before, due, norm, _ = _whole([_step(place, {}, base)])
    rates = Rates(1e-3, routers=2e-3, tower=5e-4, projector=0.0)
    _, found, other_norm, _ = _whole([_step(place, {}, rates)])
    assert other_norm == norm
    factors = {"decoder": 1.0, "router": 2.0, "tower": 0.5, "projector": 0.0}
    for name, start in before.items():
        factor = factors[part_of(name)]
        assert np.abs((found[name] - start) - factor * (due[name] - start)).max() < 1e-12, name
        assert np.array_equal(found[name], start) == (factor == 0.0), name


@pytest.mark.parametrize("frozen", [("tower",), ("tower", "projector"), ("projector",), ("decoder",), ("decoder", "tower")])
def test_frozen_parts_stay_and_the_others_move_as_without(place: Path, frozen: tuple[str, ...]) -> None:
    before, due, _, loss = _whole([_step(place, {}, Rates(1e-3))])
    _, found, _, same_loss = _whole([_step(place, {}, Rates(1e-3), frozen)])
    assert same_loss == loss
    for name, start in before.items():
        stays = part_of(name).replace("router", "decoder") in frozen
        assert np.array_equal(found[name], start if stays else due[name]), name


@pytest.mark.layouts
@pytest.mark.parametrize("frozen", [("tower",), ("decoder",), ("tower", "projector")])
def test_frozen_parts_stay_on_every_layout(place: Path, frozen: tuple[str, ...]) -> None:
    _, due, norm, _ = _whole([_step(place, {}, Rates(1e-3), frozen)])
    for layout, (_, found, other_norm, _) in zip(LAYOUTS, _on_every_layout(place, frozen), strict=True):
        assert other_norm == pytest.approx(norm, rel=1e-10), layout
        for name, value in due.items():
            assert np.abs(found[name] - value).max() < 1e-9, (layout, name)


@pytest.mark.parametrize("frozen", [(), ("decoder",)])
def test_a_step_without_any_picture_moves_no_tower(place: Path, frozen: tuple[str, ...]) -> None:
    """AdamW's decay of matrices aside; the decoder moves as in a step of text."""
    before, due, *_ = _whole([_step(place, {}, Rates(1e-3), frozen, blank=True)])
    for name, start in before.items():
        if part_of(name) in ("tower", "projector"):
            decayed = start * (1 - 1e-3 * 0.1) if start.ndim > 1 else start
            assert np.abs(due[name] - decayed).max() < 1e-12, name
        else:
            assert np.array_equal(due[name], start) == bool(frozen), name
    for layout, (_, found, *_) in zip(LAYOUTS, _on_every_layout(place, frozen, blank=True), strict=True):
        assert all(np.abs(found[name] - value).max() < 1e-9 for name, value in due.items()), layout
