"""Parents that route in groups: children whose copies stay in their parent's group compute exactly what the parent does.

The closed form here is float64 numpy, written from the definition: of every group the expert with the largest logit, equal ones
to the lowest slot, weights by the softmax over those chosen.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.verify import verify
from tests.parents import make_child
from tests.upcycle.families import Parent, due, expanded, make
from tests.upcycle.stacks import Tensors, apart, assert_same, read

HIDDEN = 32


def layer(
    tensors: Tensors, mlp: str, x_TH: np.ndarray, groups: int, top_k: int, rows: list[list[int]] | None = None
) -> np.ndarray:
    """A layer with experts in float64, token by token; every dot product for itself, so that equal rows give equal numbers.

    Args:
        rows: experts of every group; None cuts them in order.
    """
    weights = {name.removeprefix(mlp): value.double().numpy() for name, value in tensors.items() if name.startswith(mlp)}
    router = weights["gate.weight"]
    members = np.arange(len(router)).reshape(groups, -1) if rows is None else np.array(rows)
    out = np.zeros_like(x_TH)
    for token, x in enumerate(x_TH):
        logits = (router * x).sum(1)
        chosen = [e for group in members for e in sorted(group.tolist(), key=lambda e: -logits[e])[: top_k // groups]]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            gate, up, down = (weights[f"experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            inner = (gate * x).sum(1)
            out[token] += weight * (down * (inner / (1 + np.exp(-inner)) * (up * x).sum(1))).sum(1)
    return out


def inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, HIDDEN))


def outputs(tensors: Tensors, parent: Parent, groups: int, top_k: int) -> list[np.ndarray]:
    return [layer(tensors, mlp, inputs(), groups, top_k) for mlp in parent.mlps]


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_an_expansion_inside_the_groups_is_the_parents_function(layout: str, tmp_path: Path) -> None:
    parent = make("interns1_pro", tmp_path / "parent")
    child, rows = expanded(parent, tmp_path / "child", experts_layout=layout)
    for slot, expert in enumerate(rows[0]):
        assert slot // (64 // 8) == expert // (16 // 8)
    assert sorted(rows[0]) == sorted(list(range(16)) * 4)
    tensors = apart(read(child), transposed=False)
    for before, after in zip(outputs(parent.tensors, parent, 8, 8), outputs(tensors, parent, 8, 8), strict=True):
        assert np.array_equal(before, after)
        assert np.abs(before).max() > 0.01
    verify(parent.folder, child)


def test_a_map_that_keeps_the_groups_is_allowed_and_one_that_does_not_is_named(tmp_path: Path) -> None:
    """Copies may be dealt unevenly and in any order, as long as no expert leaves its group."""
    parent, random = make("interns1_pro", tmp_path / "parent"), np.random.default_rng(1)
    rows = {}
    for number in (0, 2):
        groups = [[2 * g, 2 * g + 1, *random.integers(2 * g, 2 * g + 2, 6).tolist()] for g in range(8)]
        rows[str(number)] = [expert for group in groups for expert in random.permutation(group).tolist()]
    (tmp_path / "map.json").write_text(json.dumps(rows))
    child, found = expanded(parent, tmp_path / "child", placement="map", map=tmp_path / "map.json")
    assert found == [rows["0"], [], rows["2"]]
    tensors = read(child)
    assert_same(tensors, due(parent, found, fused=False))
    for before, after in zip(outputs(parent.tensors, parent, 8, 8), outputs(tensors, parent, 8, 8), strict=True):
        assert np.abs(before - after).max() <= 1e-14
    verify(parent.folder, child)
    first = rows["2"].index(9)
    rows["2"][first], rows["2"][0] = rows["2"][0], rows["2"][first]
    (tmp_path / "map.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"expert 9 of layer 2 into group 0, .*group 4; give placement=block"):
        expanded(parent, tmp_path / "other", placement="map", map=tmp_path / "map.json")


@pytest.mark.parametrize(
    "placement", ["quarters_spread", "block_spread", "halves_bits", "halves_tile", "random_balanced", "quarters", "full_copy"]
)
def test_placements_that_would_mix_the_groups_are_refused(placement: str, tmp_path: Path) -> None:
    parent = make("interns1_pro", tmp_path / "parent", experts=32)
    with pytest.raises(InputError, match=r"was trained with it in group \d; give placement=block"):
        expanded(parent, tmp_path / "child", num_experts=256, placement=placement)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_another_number_of_groups_than_the_parents_is_refused(groups: int, tmp_path: Path) -> None:
    parent = make("interns1_pro", tmp_path / "parent")
    with pytest.raises(InputError, match="routes in 8 groups already; its child must have num_groups=8"):
        expanded(parent, tmp_path / "child", num_groups=groups)


@pytest.mark.parametrize(
    ("wishes", "says", "accepted"),
    [
        ({"num_experts": 16}, "it routes in groups already, so give a multiple of it, such as 32", {"num_experts": 32}),
        ({"num_experts": 40}, "give 32 or 48, or choose the copies by placement=map", {"num_experts": 48}),
        ({"num_groups": 3}, "routes in 8 groups already; its child must have num_groups=8", {"num_groups": 8}),
    ],
)
def test_hints_name_what_a_parent_with_groups_can_have(
    wishes: dict[str, Any], says: str, accepted: dict[str, Any], tmp_path: Path
) -> None:
    parent = make("interns1_pro", tmp_path / "parent")
    with pytest.raises(InputError, match=says):
        expanded(parent, tmp_path / "child", **wishes)
    expanded(parent, tmp_path / "child", **accepted)


def test_a_plan_that_moves_a_slot_out_of_its_group_is_refused(tmp_path: Path) -> None:
    parent = make("interns1_pro", tmp_path / "parent")
    child, rows = expanded(parent, tmp_path / "child")
    moved = [rows[0][-1], *rows[0][1:-1], rows[0][0]]
    plan = replace(read_plan(child / "expansion.json"), slot_to_parent=(tuple(moved), (), tuple(rows[2])))
    with pytest.raises(InputError, match="expert 15 of layer 0 into group 0"):
        Recipe(open_checkpoint(parent.folder), plan)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "interns1"])
def test_regrouping_and_then_expanding_inside_the_groups_keeps_the_regrouped_function(family: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent")
    wishes = {"num_groups": 4, "experts_layout": "split"}
    with pytest.raises(InputError, match=r"num_experts=8 is what .* has; .*regroup=true"):
        make_child(parent.folder, tmp_path / "x", num_experts=8, placement="block_spread", **wishes)
    regrouped = make_child(parent.folder, tmp_path / "r", num_experts=8, placement="block_spread", regroup=True, **wishes)
    record = json.loads((regrouped / "expansion.json").read_text())
    rows = record["slot_to_parent"]
    assert [sorted(row) for row in rows] == [list(range(8)), [], list(range(8))]
    middle = read(regrouped)
    # Every slot is its parent's only copy and so exact, the placement's default noise notwithstanding.
    assert record["router_noise"] == 0.05
    assert_same(middle, due(parent, rows, fused=False))
    for number, mlp in zip((0, 2), parent.mlps, strict=True):
        groups = np.array(rows[number]).reshape(4, 2).tolist()
        by_hand = layer(parent.tensors, mlp, inputs(), 4, 4, groups)
        assert np.array_equal(layer(middle, mlp, inputs(), 4, 4), by_hand)
        plain = layer(parent.tensors, mlp, inputs(), 1, 4)
        assert np.abs(plain - by_hand).max() > 1e-3
    child = make_child(regrouped, tmp_path / "child", num_experts=32, placement="block", **wishes)
    last = read(child)
    for before, after in zip(outputs(middle, parent, 4, 4), outputs(last, parent, 4, 4), strict=True):
        assert np.array_equal(before, after)
    verify(parent.folder, regrouped)
    verify(regrouped, child)
    assert json.loads((child / "config.json").read_text()) == json.loads(
        (regrouped / "config.json").read_text().replace('num_experts": 8', 'num_experts": 32')
    )


def test_regroup_is_only_for_the_parents_own_number_of_experts(tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent")
    with pytest.raises(InputError, match="regroup=true keeps the 8 experts"):
        expanded(parent, tmp_path / "child", regroup=True)


def test_a_regrouped_child_of_an_expansion_by_halves_is_not_the_parents_function(tmp_path: Path) -> None:
    """What the exactness rests on: without groups in the parent, copying does not keep the function."""
    parent = make("qwen3_moe", tmp_path / "parent", dtype=torch.float32)
    child, _ = expanded(parent, tmp_path / "child", init=Init(), default_noise=False)
    for mlp in parent.mlps:
        before, after = layer(parent.tensors, mlp, inputs(), 1, 4), layer(read(child), mlp, inputs(), 4, 4)
        assert np.abs(before - after).max() > 1e-3
