"""Before training a child computes the closed form of its placement, layer by layer and as a whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import closed_form
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
