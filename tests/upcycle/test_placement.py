"""Placements give every parent the same number of copies, in the groups that their definitions say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.upcycle.placement import PLACEMENTS, slot_map


def test_halves_tile_of_the_main_job_is_the_index_modulo_128() -> None:
    assert slot_map("halves_tile", 128, 512, 8).tolist() == [slot % 128 for slot in range(512)]


def test_halves_bits_of_the_main_job_splits_pair_i_by_bit_i() -> None:
    groups = slot_map("halves_bits", 128, 512, 8).reshape(8, 64)
    for pair in range(4):
        assert groups[2 * pair].tolist() == [expert for expert in range(128) if not expert & 2**pair]
        assert groups[2 * pair + 1].tolist() == [expert for expert in range(128) if expert & 2**pair]


@given(st.sampled_from(sorted(PLACEMENTS)), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 8))
def test_every_parent_has_as_many_copies_and_every_pair_of_groups_all_parents(
    placement: str, bits: int, odd: int, pairs: int, copies: int
) -> None:
    parents = 2**bits * odd
    if placement == "halves_bits" and parents % 2**pairs:
        return
    slots, groups = parents * pairs * copies, 2 * pairs
    if slots <= parents:
        return
    row = slot_map(placement, parents, slots, groups)
    assert np.bincount(row, minlength=parents).tolist() == [slots // parents] * parents
    for pair in row.reshape(pairs, 2, -1):
        assert len(set(pair[0])) == len(set(pair[1])) == parents // 2
        assert set(pair[0]) | set(pair[1]) == set(range(parents))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("halves_bits", 128, 500, 8), "500 experts are not a multiple"),
        (("halves_bits", 128, 128, 8), "not a multiple"),
        (("halves_tile", 128, 512, 7), "num_groups may be 2, 4, 8"),
        (("halves_tile", 128, 512, 16), "num_groups may be 2, 4, 8"),
        (("halves_tile", 128, 512, 0), "num_groups may be 2, 4, 8"),
        (("halves_tile", 9, 36, 8), "no number of groups"),
        (("halves_bits", 4, 32, 16), r"2\^8"),
        (("quarters", 128, 512, 8), "known are halves_bits, halves_tile"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(arguments: tuple[str, int, int, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        slot_map(*arguments)
