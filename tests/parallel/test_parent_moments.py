"""Moments of a parent's run in its child: each expert and router row has those of the parent that its slot copies."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel import runs
from tests.parallel.legs import RULES
from tests.parallel.states import STATES, Held, held, whole_of
from tests.processes import run_on_ranks

Whole = dict[str, dict[str, np.ndarray]]


def _train(folder: Path, layout: dict[str, Any], save: Path) -> tuple[Held, list[float]]:
    """Train the parent for three steps and save."""
    from moexpand.parallel import checkpoint, ranks

    with runs.engine(folder, layout, RULES, "bf16") as built:
        runs.prepare(built)
        runs.train(built, 0, 3)
        found = held(built)
        if built.ranks.main:
            save.mkdir()
        ranks.barrier()
        checkpoint.save(built, save, {})
    return found, [3.0]


def _inherit(
    folder: Path, layout: dict[str, Any], source: Path, maps: list[list[int]] | None, scale: bool, changes: dict[str, Any]
) -> tuple[Held, list[float]]:
    """Build the child and let it take the moments over."""
    from moexpand.parallel import optimizer_state
    from moexpand.parallel.parent_moments import inherit

    with runs.engine(folder, layout, RULES, "bf16", changes) as built:
        runs.prepare(built)
        assert inherit(built, source, maps, scale) == []
        steps = [float(s["step"]) for part in optimizer_state.parts(built.optimizer) for s in part.optimizer.state.values()]
        found = held(built)
        runs.train(built, 0, 1)
    return found, steps


@pytest.fixture(scope="module")
def trained(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Whole]:
    folder = tmp_path_factory.mktemp("inherit") / "parent"
    return folder, whole_of(run_on_ranks(_train, 2, parent, {"expert": 2}, folder))


def parent_name(name: str, maps: list[list[int]]) -> tuple[str, int]:
    """The parent's tensor of a child's expert, and how many copies there are; the name as it is for all else."""
    found = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..*)", name)
    if not found:
        return name, 1
    row = maps[int(found[2])]
    mine = row[int(found[3])]
    return f"{found[1]}{mine}{found[4]}", row.count(mine)


@pytest.mark.parametrize(
    ("size", "layout", "scale"),
    [(2, {"expert": 2}, False), (2, {"tensor": 2, "expert": 2}, True), (1, {}, True), (2, {"pipeline": 2}, False)],
    ids=str,
)
def test_every_moment_of_the_child_is_its_parents(
    trained: tuple[Path, Whole], children: dict[str, Path], size: int, layout: dict[str, Any], scale: bool
) -> None:
    source, parent = trained
    child = children["halves_bits"]
    maps = json.loads((child / "expansion.json").read_text())["slot_to_parent"]
    answers = run_on_ranks(_inherit, size, child, layout, source, maps, scale, {})
    found = whole_of(answers)
    assert len(found["exp_avg"]) > 1000
    for power, state in enumerate(STATES[1:], start=1):
        for name, value in found[state].items():
            origin, copies = parent_name(name, maps)
            divisor = float(copies**power) if scale else 1.0
            due = parent[state][origin]
            if name.endswith(".mlp.gate.weight"):
                row = maps[int(name.split(".")[2])]
                divisors = np.array([row.count(mine) ** power if scale else 1 for mine in row], np.float32)[:, None]
                due, divisor = due[row] / divisors, 1.0
            np.testing.assert_allclose(value, due / np.float32(divisor), rtol=1e-6, atol=0, err_msg=f"{state} of {name}")


def test_a_run_of_the_same_model_takes_everything_over(trained: tuple[Path, Whole], parent: Path) -> None:
    source, due = trained
    found = whole_of(run_on_ranks(_inherit, 1, parent, {}, source, None, False, {}))
    for state in STATES[1:]:
        for name, value in due[state].items():
            np.testing.assert_array_equal(found[state][name], value)


def test_a_run_of_the_child_itself_is_no_parent(trained: tuple[Path, Whole], children: dict[str, Path], tmp_path: Path) -> None:
    """Its experts stay where they are, although the child's map is known."""
    child = children["halves_bits"]
    maps = json.loads((child / "expansion.json").read_text())["slot_to_parent"]
    due = whole_of(run_on_ranks(_train, 2, child, {"expert": 2}, tmp_path / "child"))
    found = whole_of(run_on_ranks(_inherit, 1, child, {}, tmp_path / "child", maps, True, {}))
    for state in STATES[1:]:
        for name, value in due[state].items():
            np.testing.assert_array_equal(found[state][name], value)


def test_another_model_is_refused(trained: tuple[Path, Whole], deep_parent: Path) -> None:
    from moexpand.base.errors import InputError
    from moexpand.parallel.parent_moments import inherit

    with runs.engine(deep_parent, {}, RULES, "bf16") as built:
        runs.prepare(built)
        with pytest.raises(InputError, match=r"of another model: .* is \(.*\) there and \(.*\) here"):
            inherit(built, trained[0], None, False)
