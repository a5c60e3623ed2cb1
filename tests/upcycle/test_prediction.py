"""The prediction of step 0 equals a slow simulation, the closed forms of the placements, and the engine's own routing."""

from math import comb, exp, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.base.routing import route
from moexpand.upcycle.placement import slot_map
from moexpand.upcycle.prediction import Prediction, predict

FIGURES = ("gate_mass", "distinct", "recall", "total_variation", "top1")


def routed(logits: list[float], parent_of: list[int], top_k: int, groups: int) -> dict[int, float]:
    """Combine weight of every parent that a token visits, from the definition."""
    size = len(parent_of) // groups
    slots = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        slots += sorted(members, key=lambda slot: (-logits[parent_of[slot]], slot))[: top_k // groups]
    total = sum(exp(logits[parent_of[slot]]) for slot in slots)
    weights: dict[int, float] = {}
    for slot in slots:
        weights[parent_of[slot]] = weights.get(parent_of[slot], 0.0) + exp(logits[parent_of[slot]]) / total
    return weights


def simulated(logits: np.ndarray, row: np.ndarray, groups: int, top_k: int, parent_groups: int) -> dict[str, float]:
    """Means over tokens of the five figures, a token and an expert at a time."""
    sums = dict.fromkeys(FIGURES, 0.0)
    for token in logits.tolist():
        alpha = routed(token, list(range(len(token))), top_k, parent_groups)
        beta = routed(token, row.tolist(), top_k, groups)
        sums["gate_mass"] += sum(weight for parent, weight in alpha.items() if parent in beta)
        sums["distinct"] += len(beta)
        sums["recall"] += len(alpha.keys() & beta.keys())
        sums["total_variation"] += 0.5 * sum(abs(alpha.get(e, 0.0) - beta.get(e, 0.0)) for e in range(len(token)))
        sums["top1"] += token.index(max(token)) in beta
    return {name: value / len(logits) for name, value in sums.items()}


def figures(prediction: Prediction) -> dict[str, float]:
    return {name: getattr(prediction, name) for name in FIGURES}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans())
def test_it_equals_a_slow_simulation_for_any_map(seed: int, groups: int, per_group: int, parent_groups: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    parents, slots, top_k = 16, 32, groups * per_group
    if top_k % parent_groups:
        return
    logits = draw.normal(size=(12, parents)).round(0 if ties else 9)
    row = draw.permutation(np.concatenate([np.arange(parents), draw.integers(0, parents, slots - parents)]))
    got = figures(predict({0: logits}, {0: row}, groups, top_k, parent_groups))
    assert got == pytest.approx(simulated(logits, row, groups, top_k, parent_groups), abs=1e-12)


def test_float32_logits_give_float64_figures_and_means_are_over_layers() -> None:
    draw = np.random.default_rng(0)
    logits = {3: draw.normal(size=(50, 16)).astype(np.float32), 7: 3 * draw.normal(size=(50, 16)).astype(np.float32)}
    rows = {3: slot_map("block", 16, 64, 4), 7: slot_map("quarters", 16, 64, 8)}
    got = predict(logits, rows, 4, 4)
    assert sorted(got.layers) == [3, 7]
    for layer in (3, 7):
        one = {name: getattr(got.layers[layer], name) for name in FIGURES}
        assert one == pytest.approx(simulated(logits[layer].astype(np.float64), rows[layer], 4, 4, 1), abs=1e-12)
    for name in FIGURES:
        assert getattr(got, name) == pytest.approx((getattr(got.layers[3], name) + getattr(got.layers[7], name)) / 2)


@pytest.mark.parametrize(
    ("placement", "groups"), [("quarters", 8), ("block", 8), ("block", 4), ("full_copy", 2), ("halves_bits", 4)]
)
def test_picks_and_ties_are_those_of_the_engine(placement: str, groups: int) -> None:
    logits = torch.randn(200, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = slot_map(placement, 32, 128, groups)
    weights, slots, _ = route(logits[:, torch.from_numpy(row)], 8, groups)
    beta = torch.zeros_like(logits).scatter_add_(1, torch.from_numpy(row)[slots], weights)
    weights, own, _ = route(logits, 8)
    alpha = torch.zeros_like(logits).scatter_add_(1, own, weights)
    got = predict({0: logits.numpy()}, {0: row}, groups, 8)
    assert got.total_variation == pytest.approx(float(0.5 * (alpha - beta).abs().sum(1).mean()), abs=1e-12)
    assert got.distinct == pytest.approx(float((beta > 0).sum(1).double().mean()))
    assert got.gate_mass == pytest.approx(float((alpha * (beta > 0)).sum(1).mean()), abs=1e-12)


# ---------------------------------------------------------------- closed forms


def gaussian(tokens: int, sigma: float = 1.0, seed: int = 1) -> np.ndarray:
    return sigma * np.random.default_rng(seed).normal(size=(tokens, 128))


def independent_layers(sigma: float) -> dict[int, np.ndarray]:
    """Logits of twelve "layers": random layouts differ from draw to draw, so their figures are averaged."""
    return {layer: gaussian(2000, sigma, seed=layer) for layer in range(12)}


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def top_weights(logits: np.ndarray, top_k: int) -> np.ndarray:
    """The softmax over the best `top_k` experts of every token, 0 elsewhere."""
    weights = np.zeros_like(logits)
    best = np.argsort(-logits, 1)[:, :top_k]
    np.put_along_axis(weights, best, softmax(np.take_along_axis(logits, best, 1)), 1)
    return weights


def test_halves_tile_is_the_softmax_over_the_best_of_each_half() -> None:
    logits = gaussian(500)
    best = np.stack([logits[:, :64].argmax(1), 64 + logits[:, 64:].argmax(1)], 1)
    beta = np.zeros_like(logits)
    np.put_along_axis(beta, best, softmax(np.take_along_axis(logits, best, 1)), 1)
    alpha = top_weights(logits, 8)
    got = predict({0: logits}, {0: slot_map("halves_tile", 128, 512, 8)}, 8, 8)
    assert got.distinct == 2
    assert got.total_variation == pytest.approx(0.5 * np.abs(alpha - beta).sum(1).mean(), abs=1e-12)
    assert got.gate_mass == pytest.approx(np.take_along_axis(alpha, best, 1).sum(1).mean(), abs=1e-12)


def test_full_copy_with_two_picks_a_group_is_the_parents_top_2() -> None:
    logits = gaussian(500)
    got = predict({0: logits}, {0: slot_map("full_copy", 128, 512, 4)}, 4, 8)
    assert (got.distinct, got.recall, got.top1) == (2, 2, 1)
    alpha = top_weights(logits, 8)
    assert got.total_variation == pytest.approx(0.5 * np.abs(alpha - top_weights(logits, 2)).sum(1).mean(), abs=1e-12)


def test_tied_copies_in_a_group_with_two_picks_collapse_to_one_parent_a_group() -> None:
    got = predict({0: gaussian(500)}, {0: slot_map("block", 128, 512, 4)}, 4, 8)
    assert got.distinct == 4


def test_a_parent_with_the_same_groups_is_kept_exactly_by_block() -> None:
    got = predict({0: gaussian(200)}, {0: slot_map("block", 128, 512, 8)}, 8, 8, parent_groups=8)
    assert figures(got) == pytest.approx({"gate_mass": 1, "distinct": 8, "recall": 8, "total_variation": 0, "top1": 1}, abs=1e-12)


def test_block_recalls_the_expected_number_of_the_parents_top_8() -> None:
    expected = 8 * (1 - comb(112, 8) / comb(128, 8))
    assert expected == pytest.approx(5.34, abs=0.005)
    tokens = 20_000
    got = predict({0: gaussian(tokens)}, {0: slot_map("block", 128, 512, 8)}, 8, 8)
    assert got.recall == pytest.approx(expected, abs=3 * 0.87 / sqrt(tokens))  # 0.87: standard deviation of one token
    assert got.distinct == 8


@pytest.mark.parametrize("placement", ["halves_tile", "halves_bits", "random_balanced"])
def test_the_second_pick_of_two_halves_is_the_parents_second_with_probability_64_in_127(placement: str) -> None:
    # A pair of groups picks the best of both halves: with top-2, the parent's own choice iff these are in different halves.
    tokens = 20_000
    half = slot_map(placement, 128, 512, 8)[:128]
    got = predict({0: gaussian(tokens)}, {0: half}, 2, 2)
    chance = 64 / 127
    assert got.recall - 1 == pytest.approx(chance, abs=3 * sqrt(chance * (1 - chance) / tokens))


def random_quarters(seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    groups = np.concatenate([draw.permutation(128).reshape(4, 32) for _ in range(2)])
    return np.tile(groups, (1, 2)).reshape(-1)


@pytest.mark.parametrize(
    ("placement", "groups", "distinct", "recall", "mass"),
    [
        ("halves_tile", 8, 2.0, 2.0, (0.37, 0.51)),
        ("halves_bits", 8, 3.5, 3.5, (0.56, 0.69)),
        ("random_balanced", 8, 3.5, 3.5, (0.56, 0.69)),
        ("two random quarters", 8, 5.7, 5.0, (0.71, 0.79)),
        ("block", 8, 8.0, 5.34, (0.74, 0.80)),
        ("full_copy", 4, 2.0, 2.0, (0.39, 0.54)),
    ],
)
def test_independent_logits_give_the_table_of_the_reference(
    placement: str, groups: int, distinct: float, recall: float, mass: tuple[float, float]
) -> None:
    rows = {
        layer: random_quarters(layer)
        if placement == "two random quarters"
        else slot_map(placement, 128, 512, groups, layer=layer)
        for layer in range(12)
    }
    for sigma, expected in zip((1.0, 2.0), mass, strict=True):
        got = predict(independent_layers(sigma), rows, groups, 8)
        assert got.distinct == pytest.approx(distinct, abs=0.06)
        assert got.recall == pytest.approx(recall, abs=0.06)
        assert got.gate_mass == pytest.approx(expected, abs=0.012)


def test_total_variation_orders_the_layouts_as_measured() -> None:
    # For independent normal logits of standard deviation 2 and 1; other logits in the reference: .50-.63, .38-.48, .20-.26.
    def variation(placement: str, sigma: float) -> float:
        rows = {layer: slot_map(placement, 128, 512, 8, layer=layer) for layer in range(12)}
        return predict(independent_layers(sigma), rows, 8, 8).total_variation

    for placement, low, high in (("halves_tile", 0.48, 0.64), ("random_balanced", 0.36, 0.50), ("block", 0.19, 0.27)):
        assert low <= variation(placement, 2.0) < variation(placement, 1.0) <= high


def test_ranked_loses_most_of_a_parent_that_has_favourites() -> None:
    draw = np.random.default_rng(0)
    logits = 1.5 * draw.normal(size=(4000, 128)) + draw.normal(size=128)
    popularity = np.bincount(logits.argmax(1), minlength=128)
    ranked = predict({0: logits}, {0: slot_map("ranked", 128, 512, 8, popularity=popularity)}, 8, 8)
    block = predict({0: logits}, {0: slot_map("block", 128, 512, 8)}, 8, 8)
    assert ranked.recall < block.recall - 1
    assert ranked.total_variation > block.total_variation + 0.1


def test_spreading_by_co_activation_brings_the_child_closer_on_tokens_not_seen() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(128, 16)) @ draw.normal(size=(16, 64)) / 4 + 0.5 * draw.normal(size=(128, 64))
    logits = draw.normal(size=(12_000, 64)) @ rows.T / 5
    seen = (top_weights(logits[:8000], 8) > 0).astype(np.float64)
    together = (seen.T @ seen).astype(np.int64)
    held_out = {0: logits[8000:]}
    closer = {
        name: predict(held_out, {0: slot_map(name, 128, 512, 8, affinity=together)}, 8, 8)
        for name in ("quarters_spread", "block_spread", "quarters", "block")
    }
    for name in ("quarters", "block"):
        assert closer[f"{name}_spread"].total_variation < closer[name].total_variation - 0.03
        assert closer[f"{name}_spread"].recall > closer[name].recall + 0.25
    assert closer["quarters_spread"].distinct > 5.3


# ---------------------------------------------------------------- what is refused


def test_a_logit_that_is_not_finite_is_named_by_layer() -> None:
    logits = gaussian(4)
    logits[1, 2] = np.inf
    with pytest.raises(InputError, match="layer 5"):
        predict({5: logits}, {5: slot_map("block", 128, 512, 8)}, 8, 8)


def test_no_logits_are_refused() -> None:
    with pytest.raises(InputError, match="no router logits"):
        predict({}, {}, 8, 8)
