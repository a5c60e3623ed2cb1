"""Pictures are spread over packs by exchanges alone: no pack is added or overfull, nothing is lost, and loads come closer."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.data.packing import best_fit, count_packs, plan_window
from moexpand.data.sharing import share
from moexpand.data.spreading import spread

CAPACITY = 64


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, CAPACITY), st.booleans()), min_size=1, max_size=120))
def test_packs_stay_as_many_and_within_their_capacity_and_the_heaviest_does_not_grow(chunks):
    lengths = np.array([length for length, _ in chunks], dtype=np.int64)
    vision = np.array([max(length - 2, 1) * pictured for length, pictured in chunks], dtype=np.int64)
    before, count = best_fit(lengths, CAPACITY)
    after = spread(before, lengths, vision, CAPACITY)
    assert set(after.tolist()) == set(range(count))
    assert np.bincount(after, weights=lengths, minlength=count).max() <= CAPACITY
    loads = [np.bincount(pack, weights=vision, minlength=count) for pack in (before, after)]
    assert loads[1].sum() == loads[0].sum()
    assert loads[1].max() <= loads[0].max()
    assert (loads[1] ** 2).sum() <= (loads[0] ** 2).sum()


def test_ranks_are_level_although_best_fit_leaves_most_pictures_to_a_few_packs():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1300, 1800, 900), rng.integers(150, 770, 450)])
    vision = np.concatenate([np.zeros(900, dtype=np.int64), lengths[900:] // 2])
    before, count = best_fit(lengths, 8192)
    order = rng.permutation(count)[: count // 32 * 32].reshape(-1, 32)
    medians = []
    for pack in (before, spread(before, lengths, vision, 8192)):
        costs = np.bincount(pack, weights=vision, minlength=count).astype(np.int64)[order]
        loads = [batch[share(batch, 4)].sum(axis=0) for batch in costs]
        medians.append(np.median([load.max() / load.mean() for load in loads]))
    assert medians[0] > 1.05
    assert medians[1] < 1.02


def test_packs_of_nothing_but_pictures_are_broken_up_although_hardly_a_token_of_room_is_left():
    rng = np.random.default_rng(0)
    texts = rng.normal(1950, 300, 1200).astype(np.int64)
    lengths = np.concatenate([texts, rng.integers(240, 280, 300), rng.integers(300, 900, 400)])
    vision = np.concatenate([np.zeros(1200, dtype=np.int64), rng.integers(80, 256, 700)])
    before, count = best_fit(lengths, 4096)
    assert lengths.sum() / (count * 4096) > 0.995
    after = spread(before, lengths, vision, 4096)
    heaviest, spread_out = (np.bincount(pack, weights=vision, minlength=count).max() for pack in (before, after))
    assert heaviest > 12 * vision.sum() / count
    assert spread_out < heaviest / 2


def test_a_plan_holds_every_sample_once_with_and_without_pictures():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, CAPACITY, 500)
    vision = lengths // 2 * (rng.random(500) < 0.3)
    plans = [plan_window(np.arange(500), lengths, CAPACITY, 0, vision=seen) for seen in (None, vision)]
    for plan in plans:
        assert sorted(plan.sample.tolist()) == list(range(500))
        assert len(plan) == count_packs(lengths, CAPACITY)
        assert np.add.reduceat(plan.length, plan.first[:-1]).max() <= CAPACITY
