"""Plans cover every token once, fit, and waste no more than an independent best-fit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.data.order import hash_of_key, permutation, random_numbers
from moexpand.data.packing import Plan, best_fit
from moexpand.data.planning import PackSequence, SampleOrder

GOLDEN_ORDER = [7, 0, 6, 2, 4, 5, 1, 3]
GOLDEN_HASH = 7733304464327601969

lengths_lists = st.lists(st.integers(1, 90), min_size=1, max_size=80)


def plan_epoch(lengths: np.ndarray, seq_length: int, seed: int, epoch: int, window: int = 1 << 16) -> Plan:
    """The windows of an epoch joined."""
    plans = PackSequence(lengths, SampleOrder(len(lengths), seed, window), seq_length, seed).epoch(epoch)
    firsts = np.cumsum([0, *(len(plan.sample) for plan in plans)])
    return Plan(
        np.concatenate([[0], *(plan.first[1:] + first for plan, first in zip(plans, firsts[:-1], strict=True))]),
        *(np.concatenate([getattr(plan, name) for plan in plans]) for name in ("sample", "start", "length")),
    )


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Packs that textbook best-fit decreasing needs."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(capacity - length)
    return len(left)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=80))
def test_best_fit_needs_as_many_packs_as_the_textbook(lengths):
    pack, count = best_fit(np.array(lengths, dtype=np.int64), 32)
    assert count == naive_best_fit(lengths, 32)
    loads = np.bincount(pack, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert (loads <= 32).all()
    assert (loads > 0).all()


@settings(max_examples=200, deadline=None)
@given(lengths_lists, st.integers(0, 3), st.integers(0, 3), st.integers(1, 40))
def test_every_token_is_in_exactly_one_pack_of_an_epoch(lengths, seed, epoch, window):
    plan = plan_epoch(np.array(lengths), 24, seed, epoch, window)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for sample, start, length in zip(plan.sample, plan.start, plan.length, strict=True):
        seen[sample][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    loads = np.add.reduceat(plan.length, plan.first[:-1])
    assert plan.first[-1] == len(plan.sample)
    assert (loads <= 24).all()


def test_order_depends_on_seed_and_epoch_and_is_the_same_everywhere():
    plans = {(seed, epoch): tuple(permutation(50, seed, epoch, "samples")) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(plans.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in plans.values())
    # Fixed values: a run must be able to go on after an upgrade of Python or NumPy.
    assert permutation(8, 0, 0, "samples").tolist() == GOLDEN_ORDER
    assert hash_of_key("document-t0000000") == GOLDEN_HASH


def test_random_numbers_are_spread_evenly():
    shares = random_numbers(20000, 3, "x") / 2.0**64
    counts = np.histogram(shares, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-squared with 19 degrees of freedom, p = 0.001


def test_many_short_samples_fill_packs():
    lengths = np.random.default_rng(0).integers(10, 900, 20000)
    plan = plan_epoch(lengths, 2048, seed=0, epoch=0)
    assert plan.length.sum() / (len(plan) * 2048) > 0.995
