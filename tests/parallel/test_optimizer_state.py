"""Weights and both moments of AdamW survive every change of layout, element by element, on the way there and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel import runs
from tests.parallel.legs import RULES
from tests.parallel.states import STATES, Held, held, whole_of
from tests.processes import run_on_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP1": (1, {}),
    "EP2": (2, {"expert": 2}),
    "EP4": (4, {"expert": 4}),
    "PP2": (2, {"pipeline": 2}),
    "TP2 EP2": (2, {"tensor": 2, "expert": 2}),
    "DP2": (2, {}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
}


def _reshard(folder: Path, layout: dict[str, Any], load: Path | None, save: Path) -> tuple[Held, list[float]]:
    """Train three steps from the folder, or load; then tell what is held, save, and tell the weights' step counts."""
    from moexpand.parallel import checkpoint, optimizer_state, ranks

    with runs.engine(folder, layout, RULES, "bf16") as built:
        runs.prepare(built)
        if load is None:
            runs.train(built, 0, 3)
        else:
            assert checkpoint.load(built, load) == {"step": 3}
        found = held(built)
        steps = [
            float(state["step"]) for part in optimizer_state.parts(built.optimizer) for state in part.optimizer.state.values()
        ]
        if built.ranks.main:
            save.mkdir()
        ranks.barrier()
        checkpoint.save(built, save, {"step": 3})
    return found, steps


@pytest.fixture(scope="module")
def origin(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A checkpoint of three steps on EP 2, and what it was made of."""
    folder = tmp_path_factory.mktemp("origin") / "ep2"
    whole = whole_of(run_on_ranks(_reshard, 2, parent, LAYOUTS["EP2"][1], None, folder))
    assert all(np.abs(value).max() > 0 for state in STATES for value in whole[state].values()), "every moment has moved"
    return folder, whole


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("DP2", "PP2 EP2")])
def test_there_and_back_every_element_is_the_same(
    origin: tuple[Path, dict[str, dict[str, np.ndarray]]], parent: Path, tmp_path: Path, name: str
) -> None:
    _there_and_back(origin, parent, tmp_path, name)


@pytest.mark.layouts
@pytest.mark.parametrize("name", ["DP2", "PP2 EP2"])
def test_and_on_more_layouts(
    origin: tuple[Path, dict[str, dict[str, np.ndarray]]], parent: Path, tmp_path: Path, name: str
) -> None:
    _there_and_back(origin, parent, tmp_path, name)


def _there_and_back(origin: tuple[Path, dict[str, dict[str, np.ndarray]]], parent: Path, tmp_path: Path, name: str) -> None:
    saved, due = origin
    size, layout = LAYOUTS[name]
    there = whole_of(run_on_ranks(_reshard, size, parent, layout, saved, tmp_path / "there"))
    back = whole_of(run_on_ranks(_reshard, 2, parent, LAYOUTS["EP2"][1], tmp_path / "there", tmp_path / "back"))
    for found in (there, back):
        for state in STATES:
            assert found[state].keys() == due[state].keys()
            for tensor, value in due[state].items():
                np.testing.assert_array_equal(found[state][tensor], value, err_msg=f"{name}: {state} of {tensor}")


@settings(deadline=None)  # the first example imports torch
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_every_element_of_a_stretch_once_and_in_order(shape: list[int], data: st.DataObject) -> None:
    from moexpand.parallel.optimizer_state import boxes

    whole = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    found = list(boxes(tuple(shape), start, stop))
    pieces = [
        whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, sizes, strict=True))].ravel()
        for offset, sizes in found
    ]
    np.testing.assert_array_equal(np.concatenate([np.empty(0, int), *pieces]), np.arange(start, stop))
    assert len(found) <= 2 * len(shape) - 1
