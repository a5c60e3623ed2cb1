"""Orders are permutations of which any part can be had alone, and any pack is found by planning its own window."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.mixture import PERIOD, Mixture
from moexpand.data.order import Shuffle
from moexpand.data.planning import PackSequence, SampleOrder, ShardOrder
from moexpand.data.sharing import share

GOLDEN_SHUFFLE = [7, 4, 2, 1, 10, 11, 5, 9, 6, 0, 3, 8]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 5), st.integers(0, 5))
def test_a_shuffle_is_a_permutation_and_every_part_of_it_stands_alone(count, seed, epoch):
    shuffle = Shuffle(count, seed, epoch, "samples")
    whole = shuffle(np.arange(count))
    assert sorted(whole.tolist()) == list(range(count))
    middle = np.arange(count // 3, count // 2)
    assert np.array_equal(shuffle(middle), whole[middle])


def test_a_shuffle_is_the_same_everywhere_and_has_no_drift():
    # Fixed values: a run must be able to go on after an upgrade of Python or NumPy.
    assert Shuffle(12, 0, 0, "samples")(np.arange(12)).tolist() == GOLDEN_SHUFFLE
    count = 40_000
    order = Shuffle(count, 3, 1, "samples")(np.arange(count))
    blocks = np.histogram2d(np.arange(count), order, bins=10)[0]
    assert ((blocks - 400) ** 2 / 400).sum() < 150  # chi-squared with 81 degrees of freedom, p < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=120),
    st.integers(0, 3),
    st.integers(1, 50),
    st.integers(8, 64),
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
)
def test_any_pack_is_what_reading_from_the_beginning_gives(lengths, seed, window, seq_length, wanted):
    def sequence() -> PackSequence:
        return PackSequence(np.array(lengths), SampleOrder(len(lengths), seed, window), seq_length, seed)

    reading = sequence()
    read = [reading.segments(pack) for pack in range(max(wanted) + 1)]
    for pack in wanted:
        assert sequence().segments(pack) == read[pack]
    # Packs of an epoch, counted without making them.
    epochs = {reading.locate(pack)[0] for pack in range(max(wanted) + 1)}
    for epoch in epochs:
        assert reading.packs_of_epoch(epoch) == sum(len(plan) for plan in reading.epoch(epoch))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 40))
def test_whole_shards_stay_together_and_every_sample_comes_once(sizes, seed, window):
    shard = np.repeat(np.arange(len(sizes)), sizes)
    order = ShardOrder(shard, seed, window)
    for epoch in range(2):
        windows = [order.samples(epoch, number) for number in range(order.windows)]
        assert sorted(np.concatenate(windows).tolist()) == list(range(len(shard)))
        for samples in windows:
            for number in set(shard[samples].tolist()):
                assert (shard[samples] == number).sum() == sizes[number]


def test_going_on_far_ahead_plans_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = np.random.default_rng(0).integers(10, 300, 5000)

    def sequence() -> PackSequence:
        return PackSequence(lengths, SampleOrder(len(lengths), 1, 512), 1024, 1, tmp_path)

    expected = sequence().segments(3000)
    planned: list[int] = []
    original = SampleOrder.samples
    monkeypatch.setattr(SampleOrder, "samples", lambda self, *place: planned.append(1) or original(self, *place))
    assert sequence().segments(3000) == expected
    assert len(planned) == 1
    # A damaged file of counts is no reason to stop, nor to read something else.
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert sequence().segments(3000) == expected


def test_other_lengths_or_seeds_do_not_use_each_others_counts(tmp_path: Path):
    lengths = np.random.default_rng(0).integers(10, 300, 700)
    for seed, these in ((1, lengths), (2, lengths), (1, lengths[::-1].copy())):
        kept = PackSequence(these, SampleOrder(len(these), seed, 100), 512, seed, tmp_path)
        alone = PackSequence(these, SampleOrder(len(these), seed, 100), 512, seed)
        assert [kept.segments(pack) for pack in range(0, 500, 50)] == [alone.segments(pack) for pack in range(0, 500, 50)]
    assert len(list(tmp_path.iterdir())) == 3


# ------------------------------------------------------------------ mixtures


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), st.integers(0, 3 * PERIOD))
def test_a_mixture_reads_every_pack_of_a_source_once_in_order_and_keeps_its_weights(weights, packs):
    mixture = Mixture(weights)
    read = [mixture.locate(pack) for pack in range(min(packs, 600))]
    for source in range(len(weights)):
        assert [number for chosen, number in read if chosen == source] == list(range(sum(s == source for s, _ in read)))
    counts = mixture.packs_read(packs)
    assert counts.sum() == packs
    source, number = mixture.locate(packs)
    assert number == counts[source]
    wanted = np.array(weights) / sum(weights) * packs
    # Rounded to parts of the period, and spread as evenly as packs can be.
    assert (np.abs(counts - wanted) <= packs / PERIOD + len(weights)).all()


def test_weights_that_would_never_be_read_are_refused():
    with pytest.raises(InputError, match="each must be a number above 0"):
        Mixture([0.5, 0.0])
    with pytest.raises(InputError, match="would never be read"):
        Mixture([1.0, 1e-5])


# ------------------------------------------------------------------ ranks


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_every_micro_batch_goes_to_one_rank_and_all_ranks_have_as_many(ranks, each, seed):
    costs = np.random.default_rng(seed).integers(0, 900, ranks * each) * np.random.default_rng(seed + 1).integers(
        0, 2, ranks * each
    )
    dealt = share(costs, ranks)
    assert dealt.shape == (each, ranks)
    assert sorted(dealt.ravel().tolist()) == list(range(ranks * each))
    in_turn = costs[np.arange(ranks * each).reshape(each, ranks)].sum(axis=0).max()
    assert costs[dealt].sum(axis=0).max() <= in_turn


def test_ranks_are_level_where_micro_batches_allow_it():
    rng = np.random.default_rng(0)
    for ranks in (2, 4, 8):
        worst = []
        for _ in range(50):
            costs = rng.integers(200, 1500, 8 * ranks) * (rng.random(8 * ranks) < 0.7)
            loads = costs[share(costs, ranks)].sum(axis=0)
            worst.append(loads.max() / loads.mean())
        assert np.median(worst) < 1.02
        assert max(worst) < 1.10
