"""The solver separates what fires together, nearly as well as an exhaustive search, and the same way on every machine."""

from itertools import combinations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.upcycle.spread import partition, router_affinity


def affinities(experts: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).integers(0, 1000, (experts, experts)), 1)
    return upper + upper.T


def left_inside(affinity: np.ndarray, part: np.ndarray) -> int:
    return sum(int(affinity[i, j]) for i, j in combinations(range(len(part)), 2) if part[i] == part[j])


def optimum(affinity: np.ndarray, size: int, experts: tuple[int, ...]) -> int:
    """The least affinity that parts of `size` of these experts can leave inside, by trying every partition."""
    if not experts:
        return 0
    first, *rest = experts
    found = []
    for others in combinations(rest, size - 1):
        inside = sum(int(affinity[i, j]) for i, j in combinations((first, *others), 2))
        found.append(inside + optimum(affinity, size, tuple(expert for expert in rest if expert not in others)))
    return min(found)


@pytest.mark.parametrize(("experts", "parts"), [(6, 2), (6, 3), (8, 2), (8, 4), (9, 3), (10, 2), (10, 5)])
def test_the_partition_is_as_good_as_an_exhaustive_search_on_small_instances(experts: int, parts: int) -> None:
    gaps = []
    for seed in range(30):
        affinity = affinities(experts, seed)
        best = optimum(affinity, experts // parts, tuple(range(experts)))
        gaps.append(left_inside(affinity, partition(affinity, parts)) / best - 1)
    assert min(gaps) >= 0
    assert np.mean(gaps) <= 0.01
    assert np.mean(np.array(gaps) == 0) >= 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_parts_are_equal_and_no_swap_of_two_experts_is_better(parts: int, size: int, seed: int) -> None:
    affinity = affinities(parts * size, seed)
    part = partition(affinity, parts)
    assert np.bincount(part, minlength=parts).tolist() == [size] * parts
    reached = left_inside(affinity, part)
    for i, j in combinations(range(len(part)), 2):
        swapped = part.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert left_inside(affinity, swapped) >= reached


def test_at_real_size_much_less_is_left_inside_than_by_index() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(128, 16)) @ draw.normal(size=(16, 64))
    logits = draw.normal(size=(4096, 64)) @ rows.T
    top = np.zeros(logits.shape)
    np.put_along_axis(top, np.argsort(-logits, 1)[:, :8], 1, 1)
    together = (top.T @ top).astype(np.int64)
    for parts in (4, 8):
        by_index = left_inside(together, np.repeat(np.arange(parts), 128 // parts))
        assert left_inside(together, partition(together, parts)) < 0.88 * by_index


@given(st.integers(0, 99), st.integers(1, 20))
def test_neither_scale_nor_diagonal_changes_the_partition(seed: int, scale: int) -> None:
    affinity = affinities(16, seed)
    part = partition(affinity, 4)
    assert np.array_equal(part, partition(affinity * scale, 4))
    assert np.array_equal(part, partition(affinity + np.diag(np.arange(16) * 1000), 4))


def test_counts_near_the_largest_whole_number_do_not_overflow() -> None:
    affinity = affinities(32, 0)
    huge = affinity << 53
    assert huge.max() > 2**62
    part = partition(huge, 4, np.full((32, 32), 9))
    assert np.array_equal(part, partition(affinity, 4, np.full((32, 32), 9)))


def test_a_second_partition_avoids_the_pairs_of_the_first() -> None:
    for affinity in (np.zeros((64, 64), dtype=np.int64), np.ones((64, 64), dtype=np.int64), affinities(64, 0)):
        first = partition(affinity, 4)
        both = first[:, None] == first
        second = partition(affinity, 4, both.astype(np.int64))
        again = both & (second[:, None] == second)
        # 64 * 15 ordered pairs share a quarter of one partition; of two that know nothing of each other, 15 in 63 of them.
        assert again.sum() - 64 <= 64 * 15 * 15 / 63


# ---------------------------------------------------------------- from router rows


def cosines(rows: np.ndarray) -> np.ndarray:
    """Positive part of the cosine of the centred rows, in float64."""
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return np.maximum(unit @ unit.T, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_router_affinity_is_the_cosine_of_centred_rows(dtype: type) -> None:
    draw = np.random.default_rng(0)
    rows = (0.02 * draw.normal(size=(128, 256)) + 0.01 * draw.normal(size=256)).astype(dtype)
    affinity = router_affinity(rows)
    assert affinity.dtype == np.int64
    assert np.array_equal(affinity, affinity.T)
    np.testing.assert_allclose(affinity / 2**20, cosines(rows), rtol=0, atol=2e-5)


def test_router_affinity_does_not_depend_on_the_order_of_sums_nor_on_powers_of_two() -> None:
    rows = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    affinity = router_affinity(rows)
    for seed in range(5):
        assert np.array_equal(affinity, router_affinity(rows[:, np.random.default_rng(seed).permutation(4096)]))
    assert np.array_equal(affinity, router_affinity(rows * np.float32(2**-20)))


def test_router_rows_that_are_zero_or_equal_are_no_error() -> None:
    rows = np.zeros((4, 8))
    assert not router_affinity(rows).any()
    assert not router_affinity(rows + 3).any()


def test_router_rows_that_are_not_finite_are_refused() -> None:
    rows = np.ones((4, 8))
    rows[2, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        router_affinity(rows)
