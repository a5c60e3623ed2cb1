"""Noise and Drop-Upcycling do what their formulas say, in the stored dtype, with bytes that depend on nothing but the recipe."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.base.random import generator, normals
from moexpand.upcycle import inits
from moexpand.upcycle.inits import INNER_AXIS, Init, changes_experts, check_visible, expert_matrix, router_rows

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BF16]
HALF_SPACING = {np.dtype(np.float32): 2**-24, np.dtype(np.float64): 2**-53, np.dtype(np.float16): 2**-11, BF16: 2**-8}
"""Largest relative error of one rounding to the dtype's normal numbers."""


def weights(rows: int, width: int, dtype: np.dtype, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * scale).astype(dtype)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def assert_one_rounding(result: np.ndarray, exact: np.ndarray) -> None:
    """`result` is `exact` (float64) rounded once, give or take the error of the fp32 arithmetic before it."""
    arithmetic = 2**-52 if result.dtype == np.float64 else 2**-22
    bound = np.abs(exact) * HALF_SPACING[result.dtype] + arithmetic * np.abs(exact).max() + 2**-24 * (result.dtype == np.float16)
    assert np.all(np.abs(result.astype(np.float64) - exact) <= bound)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_noise_is_relative_to_the_rms_of_each_row(dtype: np.dtype) -> None:
    rows = (weights(6, 200, np.dtype(np.float64)) * np.array([[1], [10], [0.1], [1], [3], [1]])).astype(dtype)
    exact = np.array([True, False, False, False, True, False])
    result = router_rows(rows, Init(router_noise=0.05, seed=3), 7, exact, dtype)
    assert result.dtype == dtype
    for slot in range(6):
        noise = 0 if exact[slot] else normals(generator(3, "router_noise", 7, slot), 1, 200)[0].astype(np.float64)
        assert_one_rounding(result[slot], rows[slot].astype(np.float64) + 0.05 * rms(rows[slot]) * noise)


@pytest.mark.parametrize("name", INNER_AXIS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_noise_is_relative_to_the_rms_of_the_matrix(dtype: np.dtype, name: str) -> None:
    matrix = weights(50, 30, dtype)
    result = expert_matrix(matrix, name, Init(expert_noise=0.1, seed=1), 2, 5)
    noise = normals(generator(1, "expert_noise", 2, 5, name), 50, 30).astype(np.float64)
    assert result.dtype == dtype
    assert_one_rounding(result, matrix.astype(np.float64) + 0.1 * rms(matrix) * noise)


@pytest.mark.parametrize("value", [0.01, 0.05, 0.3])
def test_noise_in_bf16_has_the_size_that_was_asked_for(value: float) -> None:
    matrix = weights(256, 1024, BF16)
    result = expert_matrix(matrix, "up_proj.weight", Init(expert_noise=value), 0, 1)
    achieved = rms(result.astype(np.float64) - matrix.astype(np.float64)) / rms(matrix)
    assert achieved == pytest.approx(value, rel=0.03)
    rows = router_rows(matrix, Init(router_noise=value), 0, np.zeros(256, bool), BF16)
    assert rms(rows.astype(np.float64) - matrix.astype(np.float64)) / rms(matrix) == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize(("value", "changed"), [(1e-6, 0.0003), (1e-4, 0.023), (1e-3, 0.226), (1e-2, 0.826)])
def test_bf16_swallows_small_noise_as_the_table_says(value: float, changed: float) -> None:
    """Part of bf16 weights that change; this is why small noise is refused."""
    matrix = weights(400, 1000, BF16)
    result = expert_matrix(matrix, "gate_proj.weight", Init(expert_noise=value), 0, 1)
    part = np.mean(result.view(np.uint16) != matrix.view(np.uint16))
    assert part == pytest.approx(changed, rel=0.03, abs=0.0002)


def test_an_fp32_router_keeps_noise_that_bf16_would_swallow() -> None:
    rows = weights(4, 4000, BF16)
    result = router_rows(rows, Init(router_noise=1e-5), 0, np.array([True, False, False, False]), np.float32)
    assert result.dtype == np.float32
    assert np.array_equal(result[0], rows[0].astype(np.float32))
    difference = result[1:].astype(np.float64) - rows[1:].astype(np.float64)
    assert rms(difference) / rms(rows) == pytest.approx(1e-5, rel=0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_slots_are_bit_identical(dtype: np.dtype) -> None:
    rows = weights(8, 64, dtype)
    rows[0, :3] = np.array([-0.0, np.finfo(np.float32).tiny, 0.0], dtype=dtype)
    exact = np.array([True, False] * 4)
    result = router_rows(rows, Init(router_noise=0.05), 0, exact, dtype)
    assert result[exact].tobytes() == rows[exact].tobytes()
    assert all(result[slot].tobytes() != rows[slot].tobytes() for slot in np.flatnonzero(~exact))
    without = router_rows(rows, Init(), 0, np.zeros(8, bool), dtype)
    assert without.tobytes() == rows.tobytes()
    assert not np.shares_memory(without, rows)


def test_without_noise_and_drop_a_matrix_is_passed_on() -> None:
    matrix = weights(4, 4, BF16)
    assert expert_matrix(matrix, "up_proj.weight", Init(router_noise=1), 0, 0) is matrix
    assert not changes_experts(Init(router_noise=1))
    assert changes_experts(Init(expert_noise=0.1))
    assert changes_experts(Init(kind="drop"))


# ---------------------------------------------------------------- Drop-Upcycling


def changed_units(before: np.ndarray, after: np.ndarray, name: str) -> np.ndarray:
    return np.flatnonzero((before != after).any(axis=1 - INNER_AXIS[name]))


def an_expert(inner: int, hidden: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    shapes = {"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden), "down_proj.weight": (hidden, inner)}
    return {name: weights(*shape, dtype, seed) + dtype.type(0.01 * seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop_replaces_the_same_units_in_all_three_matrices(dtype: np.dtype) -> None:
    expert = an_expert(40, 300, dtype)
    init = Init(kind="drop", drop_fraction=0.3, seed=9)
    dropped = {name: expert_matrix(matrix, name, init, 1, 2) for name, matrix in expert.items()}
    units = [changed_units(expert[name], dropped[name], name).tolist() for name in expert]
    assert units[0] == units[1] == units[2]
    assert len(units[0]) == round(0.3 * 40)
    others = np.setdiff1d(np.arange(40), units[0])
    for name, matrix in expert.items():
        axis = INNER_AXIS[name]
        assert dropped[name].take(others, axis).tobytes() == matrix.take(others, axis).tobytes()
        slice_ = matrix.take(units[0], axis).astype(np.float64)
        draws = normals(generator(9, "drop_values", 1, 2, name), *slice_.shape).astype(np.float64)
        assert_one_rounding(dropped[name].take(units[0], axis), slice_.mean() + slice_.std() * draws)


def test_independent_drop_takes_a_set_of_its_own_in_each_matrix() -> None:
    """Half of the units in each of three matrices touch 1 - 1/8 of all units."""
    expert = an_expert(2000, 8, np.dtype(np.float32))
    init = Init(kind="drop", drop_shared=False)
    units = [changed_units(m, expert_matrix(m, name, init, 0, 0), name) for name, m in expert.items()]
    assert [len(found) for found in units] == [1000] * 3
    touched = np.unique(np.concatenate(units))
    assert len(touched) / 2000 == pytest.approx(0.875, abs=0.03)


def test_copies_of_a_parent_drop_different_units_and_draw_different_values() -> None:
    matrix = weights(64, 16, np.dtype(np.float32))
    init = Init(kind="drop")
    children = [expert_matrix(matrix, "gate_proj.weight", init, layer, slot) for layer in range(2) for slot in range(3)]
    assert len({tuple(changed_units(matrix, child, "gate_proj.weight")) for child in children}) == 6
    whole = Init(kind="drop", drop_fraction=1.0)
    drawn = [expert_matrix(matrix, "gate_proj.weight", whole, 0, slot).ravel() for slot in range(6)]
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.15


def test_units_are_chosen_evenly() -> None:
    matrix = np.arange(20.0, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    init = Init(kind="drop", drop_fraction=0.25)
    counts = np.zeros(20)
    for slot in range(1500):
        counts[changed_units(matrix, expert_matrix(matrix, "up_proj.weight", init, 0, slot), "up_proj.weight")] += 1
    assert counts.sum() == 1500 * 5
    assert np.abs(counts / 1500 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 1500)


def test_noise_comes_after_drop() -> None:
    matrix = weights(30, 50, BF16)
    drop, noise = {"kind": "drop", "drop_fraction": 0.4}, {"expert_noise": 0.1}
    both = expert_matrix(matrix, "down_proj.weight", Init(**drop, **noise), 3, 4)
    one_after_the_other = expert_matrix(
        expert_matrix(matrix, "down_proj.weight", Init(**drop), 3, 4), "down_proj.weight", Init(**noise), 3, 4
    )
    assert both.tobytes() == one_after_the_other.tobytes()


def test_a_tiny_fraction_still_drops_one_unit() -> None:
    matrix = weights(10, 6, np.dtype(np.float32))
    result = expert_matrix(matrix, "up_proj.weight", Init(kind="drop", drop_fraction=0.001), 0, 0)
    assert len(changed_units(matrix, result, "up_proj.weight")) == 1


# ---------------------------------------------------------------- the same bytes

RECIPES = [Init(expert_noise=0.05), Init(kind="drop"), Init(kind="drop", drop_shared=False, expert_noise=0.02)]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), width=st.integers(1, 70), name=st.sampled_from(list(INNER_AXIS)), init=st.sampled_from(RECIPES),
    dtype=st.sampled_from(DTYPES), block=st.integers(1, 400),
)  # fmt: skip
def test_portions_and_strides_do_not_change_the_bytes(
    rows: int, width: int, name: str, init: Init, dtype: np.dtype, block: int
) -> None:
    matrix = weights(rows, width, dtype, rows * 71 + width)
    expected = expert_matrix(matrix, name, init, 0, 1).tobytes()
    for other in (np.asfortranarray(matrix), np.repeat(matrix, 2, axis=0)[::2], np.repeat(matrix, 2, axis=1)[:, ::2]):
        assert expert_matrix(other, name, init, 0, 1).tobytes() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inits, "BLOCK", block)
        patch.setattr(inits, "TILE", block % 7 + 1)
        assert expert_matrix(matrix, name, init, 0, 1).tobytes() == expected


@pytest.mark.parametrize("init", RECIPES)
def test_threads_and_order_do_not_change_the_bytes(init: Init) -> None:
    work = [(name, layer, slot) for name in INNER_AXIS for layer in range(3) for slot in range(5)]
    matrix = weights(96, 96, BF16)

    def made(item: tuple[str, int, int]) -> bytes:
        name, layer, slot = item
        return expert_matrix(matrix, name, init, layer, slot).tobytes()

    alone = {item: made(item) for item in work}
    with ThreadPoolExecutor(4) as pool:
        together = dict(zip(reversed(work), pool.map(made, reversed(work)), strict=True))
    assert together == alone
    assert len(set(alone.values())) == len(work)


def test_router_rows_do_not_depend_on_which_other_slots_are_exact() -> None:
    rows = weights(16, 32, BF16)
    init = Init(router_noise=0.05)
    noisy = router_rows(rows, init, 0, np.zeros(16, bool), BF16)
    some = np.arange(16) % 3 == 0
    assert np.array_equal(router_rows(rows, init, 0, some, BF16)[~some], noisy[~some])


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), seed=st.integers(0, 9))
def test_rows_are_summed_in_the_order_that_is_written_down(width: int, seed: int) -> None:
    """Addition by addition in Python: 64 columns onto the first 64, then the later half onto the earlier."""
    row = (np.random.default_rng(seed).standard_normal(width) * 1e3).tolist()
    lanes = row[:64]
    for place, value in enumerate(row[64:]):
        lanes[place % 64] += value
    while len(lanes) > 1:
        half = (len(lanes) + 1) // 2
        for place, value in enumerate(lanes[half:]):
            lanes[place] += value
        lanes = lanes[:half]
    assert inits._row_sums(np.array([row, row])).tolist() == lanes * 2


def test_the_recipe_of_one_seed_is_what_it_always_was() -> None:
    """Bytes that verify recomputes years later; if this fails, children written before cannot be proven any more."""
    matrix = (np.arange(60 * 36).reshape(60, 36) % 97 - 48).astype(np.float32).astype(BF16)
    init = Init(kind="drop", expert_noise=0.05, router_noise=0.05, seed=11)
    made = [expert_matrix(matrix, name, init, 4, 6).tobytes() for name in INNER_AXIS]
    made.append(router_rows(matrix, init, 4, np.zeros(60, bool), BF16).tobytes())
    wide = (np.arange(5 * 40001).reshape(5, 40001) * 7919 % 9973) / 3333  # numpy's own sums of it differ between 2.0 and 2.4
    made.append(expert_matrix(wide, "up_proj.weight", init, 4, 6).tobytes())
    assert [hashlib.sha256(data).hexdigest()[:16] for data in made] == [
        "5c2f1e8185c034d5",
        "e17d7309b39302a3",
        "9aae2e75c0c43d37",
        "daa67b6540fac652",
        "a0aa84523549480d",
    ]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"router_noise": 1e-3}, "BF16", "BF16"), r"router_noise=0.001 .* BF16.* at least 0.00196, or router_dtype=float32"),
        (({"router_noise": 1e-3}, "bfloat16", "bfloat16"), "stored as BF16"),
        (({"router_noise": 1e-4}, "F16", "F16"), r"at least 0.000245, or router_dtype=float32"),
        (({"router_noise": 1e-8}, "F32", "F32"), r"stored as F32, .* at least 2.99e-08\.$"),
        (({"router_noise": 1e-8}, "BF16", "BF16"), r"at least 0.00196\.$"),
        (({"expert_noise": 1e-3}, "F32", "BF16"), r"expert_noise=0.001 .* at least 0.00196\.$"),
        (({"expert_noise": 0.05}, "BF16", "F8_E4M3"), "F8_E4M3 can only be copied"),
        (({"kind": "drop"}, "BF16", "F8_E4M3"), "F8_E4M3 can only be copied"),
        (({"router_noise": 0.05}, "F8_E4M3", "BF16"), "router_noise=0"),
    ],
)  # fmt: skip
def test_noise_that_the_dtype_would_swallow_is_refused(arguments: tuple, says: str) -> None:
    values, router, expert = arguments
    with pytest.raises(InputError, match=says):
        check_visible(Init(**values), router, expert)


def test_visible_noise_is_accepted() -> None:
    check_visible(Init(router_noise=0.00196, expert_noise=0.00196), "BF16", "BF16")
    check_visible(Init(router_noise=1e-5, expert_noise=0.05), "F32", "BF16")
    check_visible(Init(), "F8_E4M3", "F8_E4M3")
    check_visible(Init(router_noise=0.05), "BF16", "F8_E4M3")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "shuffle"}, "copy or drop"),
        ({"drop_fraction": 0.0}, "drop_fraction=0.0"),
        ({"drop_fraction": 1.5}, "drop_fraction=1.5"),
        ({"router_noise": -0.1}, "router_noise=-0.1"),
        ({"expert_noise": float("nan")}, "expert_noise=nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Init(**values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_parent_with_numbers_that_are_not_finite_is_named(bad: float) -> None:
    matrix = weights(4, 8, BF16)
    matrix[2, 3] = bad
    with pytest.raises(InputError, match=r"down_proj.weight of layer 5 for slot 6 .* not finite"):
        expert_matrix(matrix, "down_proj.weight", Init(expert_noise=0.1), 5, 6)
    with pytest.raises(InputError, match="router row 2 of layer 5"):
        router_rows(matrix, Init(router_noise=0.1), 5, np.zeros(4, bool), BF16)
