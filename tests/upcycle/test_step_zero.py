"""Before training a child computes the closed form of its placement, layer by layer and as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moexpand.upcycle.calibration import read_calibration
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.planner import Wishes, make_plan, predict_step_zero, warnings
from moexpand.upcycle.verify import read_expansion
from tests import closed_form
from tests.parents import make_child
from tests.upcycle.conftest import PLACEMENTS

TOKENS = np.random.default_rng(1).integers(0, 256, (2, 24))


def _child_layer(weights: closed_form.Weights, layer: int, x_H: np.ndarray) -> np.ndarray:
    """The child's layer as its checkpoint defines it, slowly: softmax over 512, the best of every 64, divided by their sum."""
    prefix = f"model.layers.{layer}.mlp"
    probabilities = closed_form.softmax(weights[f"{prefix}.gate.weight"] @ x_H)
    chosen = [64 * group + int(np.argmax(probabilities[64 * group : 64 * group + 64])) for group in range(8)]
    total = sum(probabilities[slot] for slot in chosen)
    return sum(probabilities[slot] / total * closed_form.expert(weights, f"{prefix}.experts.{slot}", x_H) for slot in chosen)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_layer_of_the_child_is_the_closed_form_of_the_parent(parent: Path, children: dict[str, Path], placement: str) -> None:
    ours, theirs = closed_form.weights_of(children[placement]), closed_form.weights_of(parent)
    x_TH = np.random.default_rng(0).standard_normal((32, 64))
    for layer in range(2):
        child = np.stack([_child_layer(ours, layer, x_H) for x_H in x_TH])
        assert np.abs(child - closed_form.moe(theirs, layer, x_TH, closed_form.grouped_pick(placement))).max() <= 1e-12


def test_halves_tile_is_the_softmax_over_the_best_of_each_half(parent: Path) -> None:
    """The identity that model builders can hold in mind: a two-expert parent."""
    weights = closed_form.weights_of(parent)
    x_TH = np.random.default_rng(0).standard_normal((16, 64))

    def two(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.array([logits[:64].argmax(), 64 + logits[64:].argmax()])
        return chosen, closed_form.softmax(logits[chosen])

    tile = closed_form.moe(weights, 0, x_TH, closed_form.grouped_pick("halves_tile"))
    assert np.abs(tile - closed_form.moe(weights, 0, x_TH, two)).max() <= 1e-12


def test_the_closed_form_itself_reproduces_the_parent_in_transformers(parent: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent)
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS)).logits.double().numpy()
    assert np.abs(found - closed_form.logits(parent, TOKENS, closed_form.top_pick(8))).max() <= 1e-5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_transformers_logits_of_the_child_are_the_closed_form(parent: Path, children: dict[str, Path], placement: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(children[placement], trust_remote_code=True)
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS)).logits.double().numpy()
    due = closed_form.logits(parent, TOKENS, closed_form.grouped_pick(placement))
    assert np.abs(found - due).max() <= 1e-5
    # The bound means something: the other placement and the parent's own top-8 are far away.
    other = next(name for name in PLACEMENTS if name != placement)
    for pick in (closed_form.grouped_pick(other), closed_form.top_pick(8)):
        assert np.abs(found - closed_form.logits(parent, TOKENS, pick)).max() > 0.1


# ---------------------------------------------------------------- every placement

USAGE = [1 + expert % 5 for expert in range(32)]
OWN_MAP = [
    *range(16),
    *range(0, 32, 2),
    *range(16, 32),
    *range(31, 15, -1),
    *range(16),
    *range(1, 32, 2),
    *range(8, 24),
    *range(16),
]
WIDE_TOKENS = np.random.default_rng(3).integers(0, 64, (2, 20))


def _wishes(placement: str, groups: int, calibration: Path, folder: Path) -> dict[str, Any]:
    """Words of `make_child` for a placement without noise, with the files that it needs."""
    words: dict[str, Any] = {"num_experts": 128, "num_groups": groups, "default_noise": False}
    name, _, from_what = placement.partition(" ")
    if from_what == "calibrated":
        words["calibration"] = read_calibration(calibration)
    for key, value in (("map", OWN_MAP), ("usage", USAGE)):
        if name == key and from_what != "calibrated":
            (folder / f"{key}.json").write_text(json.dumps(value))
            words[key] = folder / f"{key}.json"
    if from_what == "regrouped":
        words |= {"num_experts": 32, "regroup": True}
    return words | {"placement": name}


@pytest.mark.parametrize(
    ("placement", "groups"),
    [
        ("quarters_spread", 8), ("quarters_spread calibrated", 8), ("quarters_spread", 4), ("block_spread", 8),
        ("block_spread calibrated", 8), ("block_spread regrouped", 8), ("halves_bits", 8), ("halves_tile", 8),
        ("halves_tile", 2), ("random_balanced", 8), ("quarters", 8), ("quarters", 4), ("block", 8), ("block", 2),
        ("full_copy", 4), ("full_copy", 1), ("ranked calibrated", 8), ("usage", 8), ("usage calibrated", 8), ("map", 8),
    ],
)  # fmt: skip
def test_every_placement_computes_the_closed_form_and_is_predicted(
    top8_parent: Path, calibration: Path, tmp_path: Path, placement: str, groups: int
) -> None:
    child = make_child(top8_parent, tmp_path / "child", **_wishes(placement, groups, calibration, tmp_path))
    plan = read_expansion(child).plan
    picks = [closed_form.grouped_pick(row, groups, 8) for row in plan.slot_to_parent]
    found = _transformers_logits(child, WIDE_TOKENS)
    assert np.abs(found - closed_form.logits(top8_parent, WIDE_TOKENS, picks)).max() <= 1e-5
    assert np.abs(found - closed_form.logits(top8_parent, WIDE_TOKENS, closed_form.top_pick(8))).max() > 1e-2
    counted = read_calibration(calibration)
    said = predict_step_zero(open_checkpoint(top8_parent), plan, counted)
    for layer, pick in enumerate(picks):
        figures = _closeness([_weights(rule, counted.logits(layer)) for rule in (closed_form.top_pick(8), pick)])
        assert {name: getattr(said.layers[layer], name) for name in figures} == pytest.approx(figures, abs=1e-9)


def _transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.double().numpy()


def _weights(pick: closed_form.Pick, logits_TE: np.ndarray) -> np.ndarray:
    """What every parent contributes to every token, [T, E]."""
    weights = np.zeros(logits_TE.shape)
    for token, row in enumerate(logits_TE.astype(np.float64)):
        for expert, weight in zip(*pick(row), strict=True):
            weights[token, expert] += weight
    return weights


def _closeness(weights: list[np.ndarray]) -> dict[str, float]:
    """Figures of a prediction, from the weights of the parent and of the child."""
    parent, child = weights
    return {
        "gate_mass": float((parent * (child > 0)).sum(1).mean()),
        "distinct": float((child > 0).sum(1).mean()),
        "recall": float(((parent > 0) & (child > 0)).sum(1).mean()),
        "total_variation": float(np.abs(parent - child).sum(1).mean() / 2),
    }


@pytest.mark.parametrize(
    ("placement", "groups", "collapsed"),
    [
        # c = 1 and K/G = 2: every group picks the parent's best two.
        ("full_copy", 4, lambda logits: np.argsort(-logits)[:2]),
        # c = 4 and K/G = 8: the only group picks its best parent four times, and then the next one four times.
        ("full_copy", 1, lambda logits: np.argsort(-logits)[:2]),
        # c = 4 and K/G = 4: a half's best parent takes all four picks.
        ("halves_tile", 2, lambda logits: np.array([logits[:16].argmax(), 16 + logits[16:].argmax()])),
        # c = 4 and K/G = 2: one parent of every quarter.
        ("quarters", 4, lambda logits: np.arange(0, 32, 8) + logits.reshape(4, 8).argmax(1)),
        # c = 2 and K/G = 1: each of the quarters is in two groups, which pick the same.
        ("quarters", 8, lambda logits: np.arange(0, 32, 8) + logits.reshape(4, 8).argmax(1)),
    ],
)
def test_equal_copies_collapse_as_documented(
    top8_parent: Path, calibration: Path, placement: str, groups: int, collapsed: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Equal slots tie and the lowest is first, so copies of one parent take several picks; every weight is doubled alike."""
    plan = make_plan(
        open_checkpoint(top8_parent), Wishes(num_experts=128, num_groups=groups, placement=placement, default_noise=False)
    )
    counted = read_calibration(calibration)
    for layer, row in enumerate(plan.slot_to_parent):
        for logits in counted.logits(layer).astype(np.float64):
            chosen = collapsed(logits)
            due = np.zeros(32)
            due[chosen] = closed_form.softmax(logits[chosen])
            assert _weights(closed_form.grouped_pick(row, groups, 8), logits[None])[0] == pytest.approx(due, abs=1e-12)
    said = predict_step_zero(open_checkpoint(top8_parent), plan, counted)
    assert said.distinct == len(chosen)
    warned = any("copies of fewer parents" in warning for warning in warnings(open_checkpoint(top8_parent), plan))
    assert warned == (len(row) // groups > len(set(row[: len(row) // groups])) and 8 // groups > 1)


def test_the_lowest_of_equal_slots_is_picked_and_only_noise_moves_the_others(top8_parent: Path, tmp_path: Path) -> None:
    words = {"num_experts": 128, "placement": "quarters"}
    quiet = make_child(top8_parent, tmp_path / "quiet", default_noise=False, **words)
    noisy = make_child(top8_parent, tmp_path / "noisy", init=Init(router_noise=0.05), default_noise=False, **words)
    visited = {folder: _visited(folder) for folder in (quiet, noisy)}
    first_half = np.arange(128) % 16 < 8  # a group holds its 8 parents twice
    assert visited[quiet][:, first_half].sum() == 2 * WIDE_TOKENS.size * 8
    assert visited[quiet][:, ~first_half].sum() == 0
    assert visited[noisy][:, ~first_half].sum() > WIDE_TOKENS.size


def _visited(folder: Path) -> np.ndarray:
    """How many tokens visit each slot of each layer, [layers, S], as transformers runs the child's own model code."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    counts = []

    def count(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen = next(part for part in output if not part.is_floating_point())
        counts.append(torch.bincount(chosen.flatten(), minlength=128).numpy())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(count)
    with torch.no_grad():
        model(torch.from_numpy(WIDE_TOKENS))
    return np.stack(counts)


@pytest.mark.parametrize("keep_first", [True, False])
def test_with_router_noise_the_child_is_the_closed_form_of_its_own_rows(
    top8_parent: Path, tmp_path: Path, keep_first: bool
) -> None:
    child = make_child(
        top8_parent, tmp_path / "child", num_experts=128, placement="quarters_spread", init=Init(keep_first=keep_first)
    )
    plan = read_expansion(child).plan
    assert plan.router_noise == 0.05  # the default of the _spread placements
    theirs, ours = closed_form.weights_of(top8_parent), closed_form.weights_of(child)
    weights = dict(theirs)
    for layer, row in enumerate(plan.slot_to_parent):
        name = f"model.layers.{layer}.mlp.gate.weight"
        weights[name] = ours[name]
        moved = np.linalg.norm(ours[name] - theirs[name][list(row)], axis=1) / np.linalg.norm(theirs[name][list(row)], axis=1)
        exact = [keep_first and slot == row.index(expert) for slot, expert in enumerate(row)]
        assert ((moved == 0) == exact).all()
        assert moved[~np.array(exact)].mean() == pytest.approx(0.05, rel=0.1)
    found = _transformers_logits(child, WIDE_TOKENS)
    picks = [closed_form.slot_pick(row, 8, 8) for row in plan.slot_to_parent]
    assert np.abs(found - closed_form.logits(top8_parent, WIDE_TOKENS, picks, weights)).max() <= 1e-5
    exact_picks = [closed_form.grouped_pick(row, 8, 8) for row in plan.slot_to_parent]
    assert np.abs(found - closed_form.logits(top8_parent, WIDE_TOKENS, exact_picks)).max() > 1e-3
