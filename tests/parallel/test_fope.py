"""A model with Fourier position embedding of Intern-S1-Pro's constants, through the engine, against formulas in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import closed_form
from tests.parallel import runs
from tests.parallel.test_rotary import INTERN_S1_PRO, KEPT
from tests.parents import make_parent
from tests.processes import run_on_ranks

TOKENS = np.random.default_rng(5).integers(0, 256, (4, 20))
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "TP2 recomputed": {"tensor": 2, "recompute": "full"},
    "CP2": {"context": 2},
    "PP2": {"pipeline": 2},
    "DP2": {},
}
COEFFICIENTS = {
    name: np.eye(KEPT) + np.random.default_rng(seed).normal(0, 0.05, (4, KEPT, KEPT)) for seed, name in enumerate(("sin", "cos"))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with 4 key/value heads of 128, as the released one has."""
    made = tmp_path_factory.mktemp("fope") / "parent"
    return make_parent(
        made, experts=16, top_k=4, hidden=32, intermediate=16, heads=8, kv_heads=4, head_dim=128, max_shard_size="200KB"
    )


def _shape(folder: Path) -> Any:
    return runs.shape_of(folder, **INTERN_S1_PRO, fope_frequencies=KEPT, fope_by_head=True)


def _reader(folder: Path) -> Any:
    read = runs.reader(folder)

    def with_tables(name: str, rows: slice | None) -> torch.Tensor:
        if ".rotary_emb." in name:
            return torch.from_numpy(COEFFICIENTS[name.removeprefix("model.rotary_emb.").removesuffix("_coef")])
        return read(name, rows)

    return with_tables


def _turn(x_TD: np.ndarray, group: int) -> np.ndarray:
    """The formula of FoPE: kept frequencies are mixed, the others have cosine and sine one."""
    width = INTERN_S1_PRO["head_dim"]
    kept = INTERN_S1_PRO["rope_theta"] ** (-2 * np.arange(KEPT) / width)
    angles = np.arange(len(x_TD))[:, None] * kept
    ones = np.ones((len(x_TD), width // 2 - KEPT))
    cosines = np.concatenate([np.cos(angles) @ COEFFICIENTS["cos"][group], ones], axis=1)
    sines = np.concatenate([np.sin(angles) @ COEFFICIENTS["sin"][group], ones], axis=1)
    first, second = x_TD[:, : width // 2], x_TD[:, width // 2 :]
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=1)


def _logits(folder: Path, layouts: list[dict[str, Any]], precision: str) -> list[np.ndarray | None]:
    from moexpand.parallel.batch import PackedBatch

    found: list[np.ndarray | None] = []
    for layout in layouts:
        with runs.built_engine(_shape(folder), _reader(folder), layout, {}, precision) as built:
            outputs, _ = built.logits([PackedBatch.from_sequences(torch.from_numpy(row[None])) for row in TOKENS])
            found.append(np.stack([each.numpy() for each in outputs]) if outputs else None)
    return found


def test_logits_are_the_formula_on_every_layout(folder: Path) -> None:
    due = closed_form.logits(folder, TOKENS, closed_form.top_pick(4), turn=_turn)
    plain = closed_form.logits(folder, TOKENS, closed_form.top_pick(4))
    assert np.abs(due - plain).max() > 0.1, "the tables matter"
    for precision, bound in (("fp64", 1e-9), ("fp32", 1e-4)):
        (one,) = _logits(folder, [{}], precision)
        assert np.abs(one - due).max() < bound, precision
    for answer in run_on_ranks(_logits, 2, folder, list(LAYOUTS.values()), "fp64"):
        for name, found in zip(LAYOUTS, answer, strict=True):
            assert found is None or np.abs(found - due).max() < 1e-9, name


def _gradients(folder: Path, layouts: list[dict[str, Any]]) -> list[Any]:
    found = []
    for layout in layouts:
        with runs.built_engine(_shape(folder), _reader(folder), layout, {"gradient": "ste"}, "fp64") as built:
            runs.train(runs.prepare(built, clip_grad=0.0, weight_decay=0.0), 0, 1, lr=0.0)
            found.append(runs.held_blocks(built))
    return found


def test_gradients_are_those_of_one_rank_and_the_tables_have_none(folder: Path) -> None:
    due = runs.merged(_gradients(folder, [{}]))
    assert not [name for name in due if "rotary_emb" in name]
    answers = run_on_ranks(_gradients, 2, folder, list(LAYOUTS.values()))
    for number, name in enumerate(LAYOUTS):
        found = runs.merged([answer[number] for answer in answers])
        assert found.keys() == due.keys()
        worst = max((runs.relative(found[key], value), key) for key, value in due.items())
        assert worst[0] < 1e-10, (name, worst)


def _saved_and_loaded(folder: Path, place: Path) -> list[float]:
    """Largest distance of the tables that come back at every layout from a checkpoint of two pipeline stages."""
    from moexpand.parallel import checkpoint, ranks

    distances = []
    for layout in ({"pipeline": 2}, {}, {"tensor": 2}, {"pipeline": 2}):
        with runs.built_engine(_shape(folder), _reader(folder), layout) as built:
            runs.prepare(built)
            if not distances:
                runs.train(built, 0, 1)
                if built.ranks.main:
                    place.mkdir()
                ranks.barrier()
                checkpoint.save(built, place, {})
            for stage in built.stages:
                stage.rotary.sin_coef.zero_()
                stage.rotary.cos_coef.zero_()
            checkpoint.load(built, place)
            tables = built.stages[0].rotary
            kept = ((tables.sin_coef, "sin"), (tables.cos_coef, "cos"))
            distances.append(max(float(np.abs(table.numpy() - COEFFICIENTS[name]).max()) for table, name in kept))
    return distances


def test_checkpoints_keep_the_tables_for_every_layout(folder: Path, tmp_path: Path) -> None:
    for distances in run_on_ranks(_saved_and_loaded, 2, folder, tmp_path / "saved"):
        assert len(distances) == 4
        assert max(distances) < 1e-6, "fp32 of the numbers that were read"
