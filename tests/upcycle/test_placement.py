"""Placements give every parent its number of copies, in the groups that their definitions say."""

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.upcycle.placement import (
    NEEDS_AFFINITY,
    NEEDS_POPULARITY,
    PLACEMENTS,
    check_fit,
    fitting_groups,
    read_map,
    read_usage,
    slot_map,
)

PARTS = {"halves_bits": 2, "halves_tile": 2, "random_balanced": 2, "quarters": 4, "quarters_spread": 4, "full_copy": 1}
"""Parts that the definitions cut the parents into; all others but `usage` cut them into one a group."""


def statistics(parents: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    affinity = draw.integers(0, 100, (parents, parents))
    return {"affinity": affinity + affinity.T, "popularity": draw.integers(0, 100, parents)}


def test_the_placements_are_those_of_the_interface() -> None:
    assert list(PLACEMENTS) == [
        *("quarters_spread", "block_spread", "halves_bits", "halves_tile", "random_balanced"),
        *("quarters", "block", "full_copy", "ranked", "usage"),
    ]


# ---------------------------------------------------------------- maps of the main job, 128 experts to 512 in 8 groups


def test_halves_tile_of_the_main_job_is_the_index_modulo_128() -> None:
    assert slot_map("halves_tile", 128, 512, 8).tolist() == [slot % 128 for slot in range(512)]


def test_halves_bits_of_the_main_job_splits_pair_i_by_bit_i() -> None:
    groups = slot_map("halves_bits", 128, 512, 8).reshape(8, 64)
    for pair in range(4):
        assert groups[2 * pair].tolist() == [expert for expert in range(128) if not expert & 2**pair]
        assert groups[2 * pair + 1].tolist() == [expert for expert in range(128) if expert & 2**pair]


def test_quarters_of_the_main_job_hold_two_copies_of_32_parents() -> None:
    groups = slot_map("quarters", 128, 512, 8).reshape(8, 64)
    for group in range(8):
        first = 32 * (group % 4)
        assert groups[group].tolist() == [*range(first, first + 32)] * 2


def test_block_of_the_main_job_holds_four_copies_of_16_parents() -> None:
    groups = slot_map("block", 128, 512, 8).reshape(8, 64)
    assert groups.tolist() == [[*range(16 * group, 16 * group + 16)] * 4 for group in range(8)]


def test_full_copy_shows_all_parents_to_every_group() -> None:
    assert slot_map("full_copy", 128, 512, 4).tolist() == [*range(128)] * 4


def test_ranked_slices_the_parents_by_popularity() -> None:
    popularity = np.array([5, 1, 9, 5, 0, 7, 3, 5])
    # By popularity, ties by index: 2 5 | 0 3 | 7 6 | 1 4.
    assert slot_map("ranked", 8, 16, 4, popularity=popularity).tolist() == [2, 5, 2, 5, 0, 3, 0, 3, 6, 7, 6, 7, 1, 4, 1, 4]


@pytest.mark.parametrize(("parents", "pairs"), [(128, 40), (96, 31), (12, 3), (6, 1)])
def test_halves_bits_goes_on_with_parities_all_balanced_and_different(parents: int, pairs: int) -> None:
    groups = slot_map("halves_bits", parents, parents * pairs, 2 * pairs).reshape(2 * pairs, -1)
    sides = [frozenset(group) for group in groups.tolist()]
    assert len(set(sides)) == 2 * pairs
    assert all(len(side) == parents // 2 for side in sides)
    assert all(sides[2 * pair] | sides[2 * pair + 1] == set(range(parents)) for pair in range(pairs))


def test_random_balanced_depends_on_seed_and_layer_alone() -> None:
    one = slot_map("random_balanced", 128, 512, 8, seed=3, layer=5)
    assert np.array_equal(one, slot_map("random_balanced", 128, 512, 8, seed=3, layer=5))
    assert not np.array_equal(one, slot_map("random_balanced", 128, 512, 8, seed=4, layer=5))
    assert not np.array_equal(one, slot_map("random_balanced", 128, 512, 8, seed=3, layer=6))


def test_quarters_spread_shows_a_parent_to_two_groups_with_different_neighbours() -> None:
    groups = slot_map("quarters_spread", 128, 512, 8, **statistics(128)).reshape(2, 4, 64)
    pairs = [{pair for group in half for pair in combinations(sorted(set(group.tolist())), 2)} for half in groups]
    # Two partitions into quarters of 32 share 4 * 32 * 31 / 2 * 31 / 127 = 484 pairs by chance, 1984 if they are equal.
    assert len(pairs[0]) == len(pairs[1]) == 1984
    assert len(pairs[0] & pairs[1]) <= 484


def test_spread_placements_separate_experts_that_always_fire_together() -> None:
    affinity = np.zeros((32, 32), dtype=np.int64)
    for team in np.random.default_rng(0).permutation(32).reshape(8, 4):
        affinity[np.ix_(team, team)] = 1000
    for placement, parts in (("quarters_spread", 4), ("block_spread", 8)):
        groups = slot_map(placement, 32, 128, 8, affinity=affinity).reshape(8, 16)
        assert all(affinity[first, second] == 0 for group in groups for first, second in combinations(sorted(set(group)), 2))
        assert all(len(set(group)) == 32 // parts for group in groups.tolist())


# ---------------------------------------------------------------- every placement at every size


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([name for name in PLACEMENTS if name != "usage"]),
    st.integers(1, 48),
    st.integers(1, 8),
    st.integers(1, 24),
    st.integers(0, 3),
)
def test_every_parent_gets_r_slots_in_groups_that_show_one_part_c_times(
    placement: str, parents: int, copies: int, groups: int, seed: int
) -> None:
    parts = PARTS.get(placement, groups)
    pairs = 2 ** ((parents & -parents).bit_length() - 1) - 1  # what the bits of the index can halve in different ways
    fits = parents % parts == 0 and groups % parts == 0 and parts * copies % groups == 0
    fits = fits and (placement != "halves_bits" or groups <= 2 * pairs)
    if not fits:
        with pytest.raises(InputError, match=r"num_groups may be|no number of groups fits") as error:
            check_fit(placement, parents, parents * copies, groups)
        for number in re.findall(r"\d+", (str(error.value) + "num_groups may be ").split("num_groups may be ")[1].split(";")[0]):
            slot_map(placement, parents, parents * copies, int(number), seed=seed, **statistics(parents, seed))
        return
    c = check_fit(placement, parents, parents * copies, groups)
    assert c == parts * copies // groups
    row = slot_map(placement, parents, parents * copies, groups, seed=seed, **statistics(parents, seed))
    assert row.dtype == np.int64
    assert np.bincount(row, minlength=parents).tolist() == [copies] * parents
    for group in row.reshape(groups, -1).tolist():
        assert group == sorted(set(group)) * c
        assert len(set(group)) == parents // parts
    for cut in row.reshape(groups // parts, -1):
        assert set(cut) == set(range(parents))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24), st.integers(1, 12), st.integers(0, 24), st.data())
def test_usage_gives_more_slots_to_parents_used_more_and_one_a_group(
    parents: int, groups: int, extra: int, data: st.DataObject
) -> None:
    slots = (parents + extra + groups - 1) // groups * groups
    popularity = np.array(data.draw(st.lists(st.integers(0, 50), min_size=parents, max_size=parents)))
    if slots > parents * groups:
        with pytest.raises(InputError, match="at most one copy"):
            check_fit("usage", parents, slots, groups)
        return
    row = slot_map("usage", parents, slots, groups, popularity=popularity)
    counts = np.bincount(row, minlength=parents)
    assert counts.sum() == slots
    assert counts.min() >= 1
    assert counts.max() <= groups
    for group in row.reshape(groups, -1).tolist():
        assert group == sorted(set(group))
    for one, other in combinations(range(parents), 2):
        if popularity[one] > popularity[other]:
            assert counts[one] >= counts[other]


def test_usage_counts_are_the_largest_remainders_of_the_shares() -> None:
    # 20 slots over 10 uses: shares 8 4 3.6 2.4 1.2 .8; the last is bound to 1, and 19 over 9.6 uses are left for the others:
    # 7.92 3.96 3.56 2.38 1.19 -> 7 3 3 2 1 and the three largest remainders.
    popularity = np.array([4.0, 2.0, 1.8, 1.2, 0.6, 0.4])
    row = slot_map("usage", 6, 20, 10, popularity=popularity)
    assert np.bincount(row).tolist() == [8, 4, 4, 2, 1, 1]


def test_usage_prefers_groups_without_experts_that_fire_together() -> None:
    affinity = np.zeros((4, 4), dtype=np.int64)
    affinity[0, 2] = affinity[2, 0] = 9
    # Parents 0 and 1 open the two groups; 2 goes where 0 is not.
    assert slot_map("usage", 4, 4, 2, popularity=np.ones(4), affinity=affinity).tolist() == [0, 3, 1, 2]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("halves_bits", 128, 500, 8), "500 experts are not a multiple"),
        (("halves_bits", 128, 64, 8), "not a multiple"),
        (("halves_tile", 128, 512, 7), r"num_groups may be 2, 4, 8 \(nearest: 8\)"),
        (("halves_tile", 128, 512, 16), "num_groups may be 2, 4, 8"),
        (("halves_tile", 128, 512, 0), r"num_groups may be 2, 4, 8 \(nearest: 2\)"),
        (("halves_tile", 9, 36, 8), "no number of groups fits"),
        (("halves_bits", 4, 32, 16), "num_groups may be 2, 4 .*random_balanced takes any"),
        (("quarters_spread", 128, 512, 2), r"num_groups may be 4, 8, 16 \(nearest: 4\)"),
        (("quarters", 6, 24, 4), "no number of groups fits"),
        (("full_copy", 128, 512, 8), r"num_groups may be 1, 2, 4 \(nearest: 4\)"),
        (("block", 128, 512, 3), r"nearest: 2\)"),
        (("usage", 128, 512, 3), r"nearest: 4\)"),
        (("thirds", 128, 512, 8), "known are quarters_spread, block_spread, halves_bits"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(arguments: tuple[str, int, int, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        slot_map(*arguments)


def test_suggestions_divide_top_k_when_it_is_given() -> None:
    assert fitting_groups("block", 120, 480) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60, 120]
    assert fitting_groups("block", 120, 480, top_k=8) == [1, 2, 4, 8]
    with pytest.raises(InputError, match=r"num_groups may be 2 \(|num_groups may be 2\."):
        check_fit("halves_tile", 12, 36, 8, top_k=8)  # 6 groups fit too, but not top-8


@pytest.mark.parametrize("placement", sorted(NEEDS_AFFINITY | NEEDS_POPULARITY))
def test_a_placement_without_its_statistics_is_refused(placement: str) -> None:
    with pytest.raises(InputError, match=f"Placement {placement} needs to know"):
        slot_map(placement, 16, 64, 8)


def test_statistics_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"affinity of layer 7 has shape \(8, 8\).*16 experts"):
        slot_map("block_spread", 16, 64, 8, layer=7, affinity=np.zeros((8, 8), dtype=np.int64))


# ---------------------------------------------------------------- maps and usage from files


def written(folder: Path, value: object) -> Path:
    file = folder / "map.json"
    file.write_text(json.dumps(value))
    return file


@pytest.mark.parametrize(
    ("value", "third"),
    [
        ([0, 1, 1, 0], [0, 1, 1, 0]),
        ([[0, 1, 1, 0], [1, 0, 0, 1]], [1, 0, 0, 1]),
        ({"3": [1, 0, 1, 1], "1": [0, 1, 1, 0]}, [1, 0, 1, 1]),
    ],
)
def test_a_map_is_read_in_each_of_its_forms(tmp_path: Path, value: object, third: list[int]) -> None:
    maps = read_map(written(tmp_path, value), [1, 3], parents=2, slots=4)
    assert {layer: row.tolist() for layer, row in maps.items()} == {1: [0, 1, 1, 0], 3: third}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([0, 1, 2, 0], r"map\.json: slot 2 of layer 1 copies 2"),
        ([0, 1, -1, 0], "slot 2 of layer 1 copies -1"),
        ([0, 1, 0.0, 0], "slot 2 of layer 1 copies 0.0"),
        ([0, True, 1, 0], "slot 1 of layer 1 copies True"),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], "no slot of layer 3 copies expert 1"),
        ([0, 1, 1], "the list of layer 1 has 3 numbers, but there are 4 slots"),
        ([[0, 1, 1, 0]], "holds 1 lists, but the parent has 2 layers"),
        ({"1": [0, 1, 1, 0]}, "layer 3 is absent"),
        ({"1": [0, 1, 1, 0], "3": [0, 1, 1, 0], "4": [0, 1, 1, 0]}, "layer 4 is not a layer with experts"),
        ({"1": 5, "3": [0, 1, 1, 0]}, "layer 1 is not a list"),
        ("halves", "layer 1 is not a list"),
    ],
)
def test_a_wrong_map_is_refused_by_file_layer_and_slot(tmp_path: Path, value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_map(written(tmp_path, value), [1, 3], parents=2, slots=4)


def test_usage_is_read_and_wrong_numbers_are_named(tmp_path: Path) -> None:
    assert read_usage(written(tmp_path, [3, 0.5, 0]), [0], 3)[0].tolist() == [3.0, 0.5, 0.0]
    for value, says in (
        ([3, -1, 0], r"map\.json: the usage of expert 1 in layer 0 is -1"),
        ([3, float("nan"), 0], "expert 1 in layer 0 is nan"),
        ([3, float("inf"), 0], "expert 1 in layer 0 is inf"),
        ([3, "2", 0], "expert 1 in layer 0 is '2'"),
        ([0, 0, 0], "every expert in layer 0 is 0"),
        ([1, 2], "has 2 numbers, but there are 3 experts"),
        ({"sizes": {"experts": 3}}, "layer"),
    ):
        with pytest.raises(InputError, match=says):
            read_usage(written(tmp_path, value), [0], 3)
