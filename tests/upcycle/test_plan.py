"""A plan says everything, can be reviewed and edited, and what cannot be is refused before anything is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.upcycle.calibration import Calibration, read_calibration
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.plan import Plan, check_plan, read_plan, row_per_line
from moexpand.upcycle.planner import Wishes, check_counts, check_map, make_plan, warnings
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.vocabulary import Growth
from tests.parents import TINY, make_parent

SIZES: dict[str, Any] = {"num_experts": 128, "num_groups": 8}


@pytest.fixture(scope="module")
def opened(top8_parent: Path) -> Checkpoint:
    return open_checkpoint(top8_parent)


@pytest.fixture(scope="module")
def counted(calibration: Path) -> Calibration:
    return read_calibration(calibration)


# ---------------------------------------------------------------- JSON


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.floats(0, 1),
    drop=st.floats(0.001, 1),
    rows=st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=4),
    sources=st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=12),
)
def test_a_plan_comes_back_from_json(
    seed: int, noise: float, drop: float, rows: list[list[int]], sources: list[int | None]
) -> None:
    plan = Plan(
        parent="sha256:1", num_experts=8, num_groups=2, placement="map", calibration="sha256:2", usage="sha256:3",
        seed=seed, init="drop", drop_fraction=drop, drop_shared=False, keep_first=False, router_noise=noise, expert_noise=noise,
        router_dtype="float32", experts_layout="fused", vocabulary=Growth(len(sources), 10, tuple(sources), ((0, 10),)),
        slot_to_parent=tuple(tuple(row) for row in rows),
    )  # fmt: skip
    text = row_per_line(plan.to_json() | {"prediction": "unknown", "warnings": ["a"], "output": {"bytes": 1}})
    again = Plan.from_json(json.loads(text), "here")
    assert again == plan
    assert again.digest == plan.digest
    assert replace(plan, seed=seed ^ 1).digest != plan.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "is a plan of version 2; this program knows version 3"),
        ({"parent": None}, "parent=None"),
        ({"usage": 3}, "usage=3"),
        ({"seed": "0"}, "seed='0'"),
        ({"num_groups": True}, "num_groups=True"),
        ({"drop_shared": 1}, "drop_shared=1"),
        ({"init": "random"}, "init='random', not copy or drop"),
        ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16', not same or float32"),
        ({"experts_layout": "same"}, "experts_layout='same', not split or fused"),
        ({"drop_fraction": 1.5}, r"drop_fraction=1\.5 is not above 0 and at most 1"),
        ({"router_noise": -0.1}, r"router_noise=-0\.1 is not a finite number"),
        ({"slot_to_parent": [[0.5]]}, "whole numbers"),
        ({"vocabulary": {"size": 3}}, "vocabulary"),
        ({"sede": 1}, "sede is missing or unknown"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_file_and_the_key(
    opened: Checkpoint, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="block"))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json() | change))
    with pytest.raises(InputError, match=says) as error:
        check_plan(opened, read_plan(tmp_path / "plan.json"), str(tmp_path / "plan.json"))
    assert "plan.json" in str(error.value)


def test_two_parents_that_differ_in_one_norm_have_two_fingerprints(tmp_path: Path) -> None:
    one, same, other = (
        open_checkpoint(make_parent(tmp_path / str(number), seed=seed, **TINY)) for number, seed in enumerate((1, 1, 2))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    plan = make_plan(one, Wishes(num_experts=16, num_groups=2, placement="block"))
    check_plan(same, plan)
    with pytest.raises(InputError, match=r"mine\.json is for another parent than .*: the fingerprints differ"):
        check_plan(other, plan, "mine.json")


# ---------------------------------------------------------------- edited plans


def _row(plan: dict[str, Any], layer: int = 1) -> list[int]:
    return plan["slot_to_parent"][layer]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan.update(num_groups=3), "num_groups=3 does not divide both top-8 and num_experts=128"),
        (lambda plan: plan.update(num_groups=0), "num_groups=0 does not divide"),
        (lambda plan: plan.update(num_experts=256), "map of layer 0 is not 256 numbers from 0 to 31"),
        (lambda plan: plan["slot_to_parent"].pop(), "maps 1 layers, but the parent has 2"),
        (lambda plan: _row(plan).pop(), "map of layer 1 is not 128 numbers"),
        (lambda plan: _row(plan).__setitem__(0, 32), "map of layer 1 is not 128 numbers from 0 to 31"),
        (lambda plan: _row(plan).__setitem__(0, -1), "map of layer 1 is not 128 numbers from 0 to 31"),
        (
            lambda plan: plan["slot_to_parent"].__setitem__(1, [0 if slot == 9 else slot for slot in _row(plan)]),
            "map of layer 1 drops expert 9",
        ),
        (lambda plan: plan.update(router_noise=1e-9), r"router_noise=1e-09 would be lost in weights stored as F32"),
    ],
)
def test_an_edit_that_is_impossible_is_named(opened: Checkpoint, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    value = make_plan(opened, Wishes(**SIZES, placement="quarters")).to_json()
    change(value)
    with pytest.raises(InputError, match=rf"^plan\.json.*{says}"):
        Recipe(opened, Plan.from_json(value, "plan.json"), "plan.json")


def test_a_vocabulary_of_another_parent_is_refused(opened: Checkpoint) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="block"))
    with pytest.raises(InputError, match=r"vocabulary grows from 65 rows, but .* has 64"):
        check_plan(opened, replace(plan, vocabulary=Growth(70, 65, (None,) * 70, ((0, 65),))))


def test_settings_of_a_plan_may_be_edited(opened: Checkpoint) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="block"))
    edited = Plan.from_json(plan.to_json() | {"router_noise": 0.1, "seed": 4, "init": "drop"}, "plan.json")
    check_map(opened, edited, "plan.json")
    rows = Recipe(opened, edited, "plan.json").router(0)
    assert (rows != Recipe(opened, plan).router(0)).any(1).sum() == 128 - 32  # the first copies stay


# ---------------------------------------------------------------- maps and the names of placements


def _swapped(plan: Plan, left: int, right: int, layer: int = 1) -> Plan:
    """Two slots of a layer change places."""
    row = list(plan.slot_to_parent[layer])
    row[left], row[right] = row[right], row[left]
    rows = list(plan.slot_to_parent)
    rows[layer] = tuple(row)
    return replace(plan, slot_to_parent=tuple(rows))


@pytest.mark.parametrize("placement", ["quarters_spread", "block_spread", "halves_bits", "random_balanced", "block", "full_copy"])
def test_a_map_that_follows_from_the_name_is_computed_again(opened: Checkpoint, placement: str) -> None:
    sizes = SIZES | ({"num_groups": 4} if placement == "full_copy" else {})
    plan = make_plan(opened, Wishes(**sizes, placement=placement, init=Init(seed=3)))
    assert check_map(opened, plan, "plan.json")
    edited = _swapped(plan, 0, 1)  # inside a group: it routes alike, and is not what the name says
    first, second = plan.slot_to_parent[1][:2]
    with pytest.raises(
        InputError, match=f"plan.json maps slot 0 of layer 1 to expert {second}, but placement {placement} to {first};"
    ):
        check_map(opened, edited, "plan.json")
    assert not check_map(opened, replace(edited, placement="map"), "plan.json")


def test_another_seed_is_another_random_map(opened: Checkpoint) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="random_balanced", init=Init(seed=3)))
    with pytest.raises(InputError, match="but placement random_balanced to"):
        check_map(opened, replace(plan, seed=4), "plan.json")
    check_map(opened, replace(make_plan(opened, Wishes(**SIZES, placement="block")), seed=4), "plan.json")


def test_groups_that_are_right_by_themselves_must_also_make_up_cuts(opened: Checkpoint, counted: Calibration) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="quarters_spread", calibration=counted))
    groups = np.array(plan.slot_to_parent[1]).reshape(8, 16)
    assert set(groups[3]) != set(groups[4])
    row = groups[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(-1).tolist()
    with pytest.raises(InputError, match="group 0 of layer 1 in a way that placement quarters_spread never does"):
        check_map(opened, replace(plan, slot_to_parent=(plan.slot_to_parent[0], tuple(row))), "plan.json")


def test_a_calibration_of_another_parent_makes_no_plan(tmp_path: Path, counted: Calibration) -> None:
    other = make_parent(tmp_path / "other", **TINY | {"experts": 32, "top_k": 8, "layers": 2, "seed": 9})
    with pytest.raises(InputError, match="was made with another parent than"):
        make_plan(open_checkpoint(other), Wishes(**SIZES, placement="block_spread", calibration=counted))


@pytest.mark.parametrize("placement", ["quarters_spread", "block_spread", "ranked"])
def test_a_map_from_a_calibration_is_computed_again_with_it_and_else_checked_for_its_form(
    opened: Checkpoint, counted: Calibration, placement: str
) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement=placement, calibration=counted))
    assert plan.calibration == counted.digest
    assert check_map(opened, plan, "plan.json", counted)
    assert not check_map(opened, plan, "plan.json")
    inside, across = _swapped(plan, 0, 1), _swapped(plan, 0, 127)
    assert not check_map(opened, inside, "plan.json")  # only the calibration could tell
    with pytest.raises(InputError, match="maps slot 0 of layer 1 to expert"):
        check_map(opened, inside, "plan.json", counted)
    with pytest.raises(InputError, match=f"group 0 of layer 1 in a way that placement {placement} never does; a map of your own"):
        check_map(opened, across, "plan.json")


@pytest.fixture
def usage(tmp_path: Path) -> Path:
    """Experts are used once to four times as often as others."""
    (tmp_path / "usage.json").write_text(json.dumps([1 + expert % 4 for expert in range(32)]))
    return tmp_path / "usage.json"


def test_the_form_of_a_usage_map_is_one_copy_a_group(opened: Checkpoint, usage: Path) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="usage", usage=usage))
    assert len(set(np.bincount(plan.slot_to_parent[0]).tolist())) > 1
    assert not check_map(opened, plan, "plan.json")
    groups = np.array(plan.slot_to_parent[1]).reshape(8, 16)
    other = next(slot for slot in range(16, 128) if plan.slot_to_parent[1][slot] in groups[0, 1:])
    with pytest.raises(InputError, match="group 0 of layer 1 in a way that placement usage never does"):
        check_map(opened, _swapped(plan, 0, other), "plan.json")


@pytest.mark.parametrize("sources", ["usage", "calibration", "both"])
def test_a_map_from_usage_is_computed_again_with_all_that_it_was_made_from(
    opened: Checkpoint, counted: Calibration, usage: Path, sources: str
) -> None:
    every: dict[str, Any] = {"usage": usage, "calibration": counted}
    given = {key: value for key, value in every.items() if sources in (key, "both")}
    plan = make_plan(opened, Wishes(**SIZES, placement="usage", **given))
    edited = _swapped(plan, 0, 1)
    assert check_map(opened, plan, "plan.json", **given)
    with pytest.raises(InputError, match=r"maps slot 0 of layer 1 to expert \d+, but placement usage to"):
        check_map(opened, edited, "plan.json", **given)
    for lacking in given:
        assert not check_map(opened, edited, "plan.json", **{key: value for key, value in given.items() if key != lacking})
    check_counts(plan, "plan.json", **given)


def test_counts_that_a_plan_was_not_made_from_are_refused(opened: Checkpoint, counted: Calibration, usage: Path) -> None:
    by_file = make_plan(opened, Wishes(**SIZES, placement="usage", usage=usage))
    by_calibration = make_plan(opened, Wishes(**SIZES, placement="block_spread", calibration=counted))
    by_name = make_plan(opened, Wishes(**SIZES, placement="block", calibration=counted))
    with pytest.raises(
        InputError, match=rf"calibration={counted.folder} is {counted.digest}, but .*plan\.json was made without one"
    ):
        check_counts(by_file, "plan.json", calibration=counted)
    for plan in (by_calibration, by_name):
        with pytest.raises(InputError, match=r"usage=\S+ is sha256:\w+, but the map of plan\.json was made without one"):
            check_counts(plan, "plan.json", usage=usage)
    usage.write_text(usage.read_text().replace(",", " ,"))
    check_counts(by_file, "plan.json", usage=usage)
    usage.write_text(usage.read_text().replace("4", "5"))
    with pytest.raises(InputError, match=rf"usage=\S+ is sha256:\w+, but the map of plan\.json was made from {by_file.usage}"):
        check_counts(by_file, "plan.json", usage=usage)
    with pytest.raises(InputError, match="nowhere"):
        check_counts(by_file, "plan.json", usage=usage.with_name("nowhere"))
    assert not check_map(opened, by_file, "plan.json", usage=usage)


def test_a_name_that_is_none_is_refused(opened: Checkpoint) -> None:
    plan = make_plan(opened, Wishes(**SIZES, placement="block"))
    with pytest.raises(InputError, match=r"plan\.json: Placement 'blocks' is unknown"):
        check_map(opened, replace(plan, placement="blocks"), "plan.json")


# ---------------------------------------------------------------- noise and warnings


@pytest.mark.parametrize(
    ("wishes", "noise"),
    [
        ({"placement": "quarters_spread"}, 0.05),
        ({"placement": "block_spread"}, 0.05),
        ({"placement": "halves_bits"}, 0.0),
        ({"placement": "quarters_spread", "default_noise": False}, 0.0),
        ({"placement": "block", "init": Init(router_noise=0.1), "default_noise": False}, 0.1),
    ],
)
def test_only_the_spread_placements_have_router_noise_unless_told(
    opened: Checkpoint, wishes: dict[str, Any], noise: float
) -> None:
    assert make_plan(opened, Wishes(**SIZES, **wishes)).router_noise == noise


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"placement": "quarters_spread"}, []),
        ({"placement": "quarters_spread", "default_noise": False}, ["only the first of them is picked"]),
        ({"placement": "block_spread"}, []),
        ({"placement": "halves_bits"}, []),
        ({"placement": "halves_tile"}, ["some groups are equal to each other"]),
        ({"placement": "quarters"}, ["only the first of them is picked", "some groups are equal to each other"]),
        ({"placement": "block", "num_groups": 4}, ["hold up to 4 equal copies of a parent and pick 2 each"]),
        ({"placement": "full_copy", "num_groups": 4}, ["some groups are equal to each other"]),
        ({"placement": "ranked"}, ["only the first of them is picked", "ranked is a negative control"]),
    ],
)
def test_warnings_say_what_is_known_of_a_plan(
    opened: Checkpoint, counted: Calibration, wishes: dict[str, Any], says: list[str]
) -> None:
    found = warnings(opened, make_plan(opened, Wishes(**SIZES | {"calibration": counted} | wishes)))
    assert len(found) == len(says)
    assert all(part in sentence for part, sentence in zip(says, found, strict=True)), found
