"""A Qwen3-VL-MoE of the engine equals transformers': logits and every gradient, and every layout equals one rank."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs, vl_runs
from tests.parallel.vl_runs import LAYERS, TABLE, VISION, PicturedMicro, engine_of, saved_state, split_name
from tests.processes import run_on_ranks
from tests.upcycle.vl_parent import IMAGE, parent_model

RULES = {"balance_coefficient": 1e-2, "z_loss_coefficient": 1e-3, "gradient": "ste"}
TWO: dict[str, dict[str, Any]] = {
    "EP2": {"expert": 2},
    "DP2 overlap": {"overlap": True},
    "TP2": {"tensor": 2},
    "TP2 EP2 recomputed": {"tensor": 2, "expert": 2, "recompute": "full"},
    "CP2": {"context": 2},
    "CP2 EP2 experts recomputed": {"context": 2, "expert": 2, "recompute": "selective"},
    "PP2": {"pipeline": 2},
    "PP2 recomputed": {"pipeline": 2, "recompute": "full"},
}
FOUR: dict[str, dict[str, Any]] = {
    "TP2 CP2": {"tensor": 2, "context": 2},
    "PP2 TP2": {"pipeline": 2, "tensor": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return parent_model(dense=(), num_hidden_layers=LAYERS, vision=VISION)


@pytest.fixture(scope="module")
def place(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_state(model, tmp_path_factory.mktemp("vl") / "state.pt")


def _pixels(micro: PicturedMicro) -> torch.Tensor:
    """transformers' `pixel_values` of a micro-batch's patches, [P, C * 2 * S * S]."""
    values = TABLE[0][micro.patches].reshape(len(micro.patches), 3, 1, -1)
    return torch.from_numpy(np.repeat(values, 2, axis=2).reshape(len(values), -1))


def _transformers(model: Any, micro: PicturedMicro) -> torch.Tensor:
    """Logits [T, V], every segment for itself."""
    logits, done = [], 0
    for tokens, grids in zip(micro.segments, micro.grids_of, strict=True):
        ids = torch.from_numpy(tokens)[None]
        seen: dict[str, Any] = {"mm_token_type_ids": (ids == IMAGE).int()}
        if grids:
            patches = sum(int(np.prod(grid)) for grid in grids)
            seen |= {"pixel_values": _pixels(micro)[done : done + patches], "image_grid_thw": torch.tensor(grids)}
            done += patches
        logits.append(model(input_ids=ids, **seen).logits[0])
    return torch.cat(logits)


def _engine_logits(place: Path, layout: dict[str, Any], precision: str) -> list[np.ndarray] | None:
    with engine_of(place, layout, precision=precision) as built:
        outputs, _ = built.logits(vl_runs.batches(built, vl_runs.micros()))
        return [each.numpy() for each in outputs] if built.ranks.last_stage else None


def test_logits_of_pictures_of_several_sizes_and_of_text_are_those_of_transformers(model: Any, place: Path) -> None:
    found = _engine_logits(place, {}, "fp32")
    assert found is not None
    with torch.no_grad():
        for number, micro in enumerate(vl_runs.micros()):
            due = _transformers(model, micro).numpy()
            assert np.abs(found[number] - due).max() < 1e-4, number
            if micro.patches is not None:
                micro.patches = 255 - micro.patches
                assert np.abs(_transformers(model, micro).numpy() - due).max() > 0.1, "the pictures matter"


def _loss(model: Any, micros: list[PicturedMicro]) -> torch.Tensor:
    total = sum(float(micro.loss_mask.sum()) for micro in micros)
    loss: Any = 0.0
    for micro in micros:
        each = torch.nn.functional.cross_entropy(_transformers(model, micro), torch.from_numpy(micro.labels), reduction="none")
        loss = loss + (each * torch.from_numpy(micro.loss_mask)).sum() / total
    return loss


def test_every_gradient_is_that_of_transformers(model: Any, place: Path) -> None:
    micros = vl_runs.micros()
    model.zero_grad()
    loss = _loss(model, micros)
    loss.backward()
    due = {name: parameter.grad for name, parameter in model.named_parameters()}
    with engine_of(place, {}) as built:
        runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
        report = built.step(vl_runs.batches(built, micros), 0.0)
        found = runs.merged([runs.held_blocks(built)])
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    seen = set()
    for name, gradient in found.items():
        kept, expert, rows = split_name(name)
        seen.add(kept)
        expected = (due[kept] if expert is None else due[kept][expert][rows]).numpy()
        scale = np.abs(due[kept].numpy()).max()
        assert np.abs(gradient - expected).max() <= 1e-4 * scale + 1e-9, name
    assert seen == due.keys(), "every parameter of transformers' model was compared"


def _gradients(place: Path, layouts: list[dict[str, Any]]) -> list[Any]:
    found = []
    for layout in layouts:
        with engine_of(place, layout, RULES, "fp64") as built:
            runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
            report = built.step(vl_runs.batches(built, vl_runs.micros()), 0.0)
            found.append((runs.held_blocks(built), report.loss, report.grad_norm))
    return found


@pytest.fixture(scope="module")
def due_on_one_rank(place: Path) -> Any:
    ((blocks, loss, norm),) = _gradients(place, [{}])
    return runs.merged([blocks]), loss, norm


@pytest.mark.parametrize(
    ("size", "layouts"),
    [pytest.param(2, TWO, id="two ranks"), pytest.param(4, FOUR, id="four ranks", marks=pytest.mark.layouts)],
)
def test_every_layout_has_the_gradients_of_one_rank(
    place: Path, due_on_one_rank: Any, size: int, layouts: dict[str, dict[str, Any]]
) -> None:
    due, loss, norm = due_on_one_rank
    answers = run_on_ranks(_gradients, size, place, list(layouts.values()))
    for number, name in enumerate(layouts):
        found = runs.merged([answer[number][0] for answer in answers])
        assert found.keys() == due.keys()
        worst = max((runs.relative(found[key], value), key) for key, value in due.items() if np.abs(value).max() > 1e-12)
        assert worst[0] < 1e-9, (name, worst)
        assert answers[0][number][1] == pytest.approx(loss, rel=1e-12), name
        assert answers[0][number][2] == pytest.approx(norm, rel=1e-9), name


def test_logits_are_the_same_on_every_layout(place: Path) -> None:
    due = _engine_logits(place, {}, "fp64")
    assert due is not None
    for layout in ({"tensor": 2}, {"context": 2}, {"pipeline": 2}):
        for answer in run_on_ranks(_engine_logits, 2, place, layout, "fp64"):
            assert answer is None or all(np.abs(one - other).max() < 1e-9 for one, other in zip(answer, due, strict=True))


def test_deepstack_needs_its_layers_on_the_first_part_of_the_pipeline(place: Path) -> None:
    with pytest.raises(AssertionError, match=r"DeepStack adds features to the first 2 layers .* has 1"):
        run_on_ranks(_engine_logits, 2, place, {"pipeline": 2, "interleave": 2}, "fp32")


def _checkpoint(place: Path, folder: Path, save: dict[str, Any], load: dict[str, Any]) -> bool:
    def batches(built: Any) -> list[Any]:
        return vl_runs.batches(built, vl_runs.micros())

    return runs.restored(partial(engine_of, place), batches, "vision", folder, save, load)


@pytest.mark.parametrize(("save", "load"), [({"tensor": 2}, {"pipeline": 2}), ({"context": 2}, {}), ({}, {"tensor": 2})])
def test_checkpoints_keep_the_tower_for_every_layout(
    place: Path, tmp_path: Path, save: dict[str, Any], load: dict[str, Any]
) -> None:
    assert run_on_ranks(_checkpoint, 2, place, tmp_path / "saved", save, load) == [True, True]
