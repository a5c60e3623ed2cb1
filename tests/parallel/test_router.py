"""The gradient that a training step gives the router (and what lies before it) is the slope of the straight-through surrogate.

The surrogate is computed by the independent float64 forward of tests/closed_form.py: chosen experts and forward weights are
kept from the unperturbed pass, and each weight moves with softmax(z / tau) over all experts alone. Balance and z-loss are
added as their formulas say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests import closed_form
from tests.closed_form import softmax
from tests.parallel import runs
from tests.parallel.runs import Micro
from tests.parents import TINY, make_parent

EXPERTS, TOP_K, GROUPS, LAYERS = 8, 4, 2, 2
BALANCE, Z_LOSS = 0.05, 0.01
GENERATOR = np.random.default_rng(11)
SEGMENTS = [GENERATOR.integers(0, 64, length) for length in (9, 5)]
MASKS = [np.array([0, 1, 1, 1, 0, 1, 1, 1, 0.0]), np.array([1, 1, 0, 1, 0.0])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TINY | {"top_k": TOP_K, "layers": LAYERS, "max_shard_size": "20KB"}
    return make_parent(tmp_path_factory.mktemp("router") / "tiny", **shape)


@dataclass
class Surrogate:
    """A routing rule for the closed form that remembers the unperturbed pass, token by token and layer by layer."""

    gradient: str
    temperature: float
    kept: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    replay: Iterator[tuple[np.ndarray, np.ndarray]] | None = None

    def pick(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.logits.append(logits)
        p, p_tau = softmax(logits), softmax(logits / self.temperature)
        if self.replay is None:
            halves = logits.reshape(GROUPS, -1)
            chosen = np.concatenate([4 * group + np.argsort(-half)[: TOP_K // GROUPS] for group, half in enumerate(halves)])
            weights = p[chosen] / p[chosen].sum()
            self.kept.append((chosen, weights - p_tau[chosen]))
            return chosen, weights
        chosen, constant = next(self.replay)
        if self.gradient == "topk":
            return chosen, p[chosen] / p[chosen].sum()
        return chosen, constant + p_tau[chosen]

    def start(self) -> None:
        self.replay, self.logits = (iter(self.kept) if self.kept else None), []


def _auxiliary(logits: list[np.ndarray], chosen: list[np.ndarray]) -> float:
    """The two losses of one layer over all tokens of the micro-batch."""
    z_TE, tokens = np.stack(logits), len(logits)
    counts = np.bincount(np.concatenate(chosen), minlength=EXPERTS)
    balance = EXPERTS / (tokens * TOP_K) * (counts * softmax(z_TE).mean(0)).sum()
    return float(BALANCE * balance + Z_LOSS * (np.log(np.exp(z_TE).sum(-1)) ** 2).mean())


def _objective(folder: Path, weights: closed_form.Weights, surrogate: Surrogate) -> float:
    """The step's loss: mean over unmasked tokens, plus the auxiliary losses of every layer."""
    surrogate.start()
    loss_sum, layers, position = 0.0, [([], []) for _ in range(LAYERS)], 0
    for segment, mask in zip(SEGMENTS, MASKS, strict=True):
        logits = closed_form.logits(folder, segment[None], surrogate.pick, weights)[0]
        labels = np.roll(segment, -1)
        loss_sum -= (np.log(softmax(logits))[np.arange(len(segment)), labels] * mask).sum()
        for layer in range(LAYERS):
            for _ in segment:
                layers[layer][0].append(surrogate.logits[position])
                layers[layer][1].append(surrogate.kept[position][0])
                position += 1
    return float(loss_sum / sum(mask.sum() for mask in MASKS) + sum(_auxiliary(*each) for each in layers))


@pytest.mark.parametrize(("gradient", "temperature"), [("ste", 1.0), ("ste", 0.5), ("topk", 1.0)])
def test_a_training_steps_gradients_are_the_slopes_of_the_surrogate(tiny: Path, gradient: str, temperature: float) -> None:
    rules = {
        "gradient": gradient,
        "temperature": temperature,
        "balance_coefficient": BALANCE,
        "z_loss_coefficient": Z_LOSS,
    }
    with runs.engine(tiny, {}, rules, "fp64", shape={"router_n_groups": GROUPS}) as built:
        found, _ = runs.gradients(runs.prepare(built, clip_grad=0.0, weight_decay=0.0), [Micro(SEGMENTS, MASKS)])
    weights, surrogate = closed_form.weights_of(tiny), Surrogate(gradient, temperature)
    _objective(tiny, weights, surrogate)
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)]
    names += ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.experts.2.down_proj.weight", "model.norm.weight"]
    for name in names:
        scale = np.abs(found[name]).max()
        assert scale > 1e-6, name
        flat, entries = weights[name].reshape(-1), GENERATOR.choice(weights[name].size, 12, replace=False)
        for entry in entries:
            value, ends = flat[entry], []
            for moved in (value + 1e-5, value - 1e-5):
                flat[entry] = moved
                ends.append(_objective(tiny, weights, surrogate))
            flat[entry] = value
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs(found[name].reshape(-1)[entry] - slope) <= 1e-6 * scale, (name, entry)
