"""Auxiliary losses of the routers equal their formulas, written here once more in float64 numpy, and so do their gradients.

Router logits come from tests/closed_form.py, so that neither the model nor the routing of the engine is its own witness. Scope
`micro` is the same on every layout, scope `global` for every micro-batch size as well.

Legend: T tokens, E experts, G groups, K experts a token visits, L layers.
"""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import closed_form
from tests.closed_form import softmax
from tests.parallel import runs
from tests.parallel.layouts import GROUPED_TWO, TWO
from tests.parallel.runs import Block, Micro
from tests.parents import TINY, make_parent
from tests.processes import run_on_ranks

EXPERTS, TOP_K, GROUPS, LAYERS, VOCAB = 8, 4, 2, 2, 64
COEFFICIENTS = np.array([0.05, 0.03, 0.01])
LOSSES = dict(zip(("balance_coefficient", "group_coefficient", "z_loss_coefficient"), COEFFICIENTS.tolist(), strict=True))
FACTORS = (2.0, 0.5)
SHAPE = {"router_n_groups": GROUPS}
SEGMENTS = (9, 7)  # lengths in a sequence of 16 tokens
BOUND = 1e-11  # of differences between trainings in float64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TINY | {"top_k": TOP_K, "layers": LAYERS, "kv_heads": 2, "max_shard_size": "20KB"}
    return make_parent(tmp_path_factory.mktemp("balance") / "tiny", **shape)


def micro_batches(step: int, sequences: int) -> list[Micro]:
    """The 4 sequences of a step in micro-batches of so many, with masks of their own; all of the last sequence is masked."""
    generator = np.random.default_rng(step)
    segments = [[generator.integers(0, VOCAB, length) for length in SEGMENTS] for _ in range(4)]
    masks = [[generator.random(length) < (0.9, 0.2, 0.6, 0.0)[number] for length in SEGMENTS] for number in range(4)]
    spans = [slice(first, first + sequences) for first in range(0, 4, sequences)]
    return [Micro([*chain(*segments[span])], [*chain(*masks[span])]) for span in spans]


def choice(z_TE: np.ndarray) -> np.ndarray:
    """The K / G best of every group [T, K]."""
    best_TGk = np.argsort(-z_TE.reshape(len(z_TE), GROUPS, -1), axis=-1)[..., : TOP_K // GROUPS]
    return (best_TGk + np.arange(0, EXPERTS, EXPERTS // GROUPS)[:, None]).reshape(len(z_TE), TOP_K)


def formula(z_TE: np.ndarray, mask_T: np.ndarray, scope: str, load_E: np.ndarray, scoring: str = "softmax") -> np.ndarray:
    """Balance loss, the mean over the groups of that inside each, and z-loss [3] of a micro-batch, times its unmasked tokens.

    Args:
        load_E: token copies of the micro-batch, or of the whole previous step in scope `global`.
    """
    scores_TE = np.exp(z_TE) if scoring == "softmax" else 1 / (1 + np.exp(-z_TE))
    counted_T = np.ones(len(z_TE)) if scope == "micro" else mask_T
    average_T = counted_T / max(1.0, counted_T.sum())

    def switch(experts: slice) -> float:
        """Number of experts * sum_e f_e P_e, f_e the part of their copies that e got and P_e its mean probability."""
        scores, load = scores_TE[:, experts], load_E[experts]
        return float(load.size * (load / load.sum() * (average_T @ (scores / scores.sum(-1, keepdims=True)))).sum())

    inside = [switch(slice(first, first + EXPERTS // GROUPS)) for first in range(0, EXPERTS, EXPERTS // GROUPS)]
    return mask_T.sum() * np.array([switch(slice(None)), np.mean(inside), average_T @ np.log(np.exp(z_TE).sum(-1)) ** 2])


def router_logits(folder: Path, micro: Micro, weights: closed_form.Weights | None = None) -> np.ndarray:
    """Logits [L, T, E] of every router for a micro-batch, each segment alone, by the independent forward pass."""
    parts = []
    for segment in np.split(micro.tokens, micro.cu_seqlens[1:-1]):
        seen: list[np.ndarray] = []

        def pick(z_E: np.ndarray, seen: list[np.ndarray] = seen) -> tuple[np.ndarray, np.ndarray]:
            seen.append(z_E)
            chosen_K = choice(z_E[None])[0]
            return chosen_K, softmax(z_E[chosen_K])

        closed_form.logits(folder, segment[None], pick, weights)
        parts.append(np.stack(seen).reshape(LAYERS, len(segment), EXPERTS))
    return np.concatenate(parts, axis=1)


def step_losses(
    folder: Path, micros: list[Micro], scope: str, previous_LE: np.ndarray, weights: closed_form.Weights | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The three losses of every layer [L, 3], means over the unmasked tokens of the step, and the loads [L, E]."""
    losses_L3, loads_LE = np.zeros((LAYERS, 3)), np.zeros((LAYERS, EXPERTS))
    for micro in micros:
        for layer, z_TE in enumerate(router_logits(folder, micro, weights)):
            load_E = np.bincount(choice(z_TE).ravel(), minlength=EXPERTS)
            counted_E, mask_T = (load_E if scope == "micro" else previous_LE[layer]), micro.loss_mask.astype(float)
            losses_L3[layer] += formula(z_TE, mask_T, scope, counted_E)
            loads_LE[layer] += load_E
    return losses_L3 / sum(micro.loss_mask.sum() for micro in micros), loads_LE


def slope(function: Any, values: np.ndarray, entry: int) -> float:
    """Central difference of `function()` by one entry of `values`, which is put back."""
    kept, ends = values.flat[entry], []
    for values.flat[entry] in (kept + 1e-5, kept - 1e-5):
        ends.append(function())
    values.flat[entry] = kept
    return float((ends[0] - ends[1]) / 2e-5)


def measured(
    z_TE: torch.Tensor, chosen_TK: np.ndarray, mask_T: np.ndarray, scope: str, previous_E: list[float], **of: Any
) -> tuple[np.ndarray, torch.Tensor]:
    """What our code makes of one router's batch: the three losses, and their weighted sum with gradient."""
    from moexpand.parallel.balance import BalanceLosses, Routing
    from moexpand.parallel.shape import RouterRules

    scores_TE = z_TE.exp() if of["scoring"] == "softmax" else 1 / (1 + torch.exp(-z_TE))
    routing = Routing(z_TE, scores_TE / scores_TE.sum(-1, keepdim=True), torch.tensor(chosen_TK), torch.tensor(mask_T > 0))
    losses = BalanceLosses(RouterRules(**LOSSES, scope=scope), chosen_TK.shape[1], group=SimpleNamespace(size=lambda: 1), **of)
    counts_E = torch.tensor(np.bincount(chosen_TK.ravel(), minlength=z_TE.shape[1]))
    found, weighted = losses(routing, counts_E, torch.tensor(previous_E))
    return found.numpy(), weighted


def test_two_tokens_by_hand() -> None:
    """Both go to the first of two experts with probability 3/4, one is masked: 2/2 * (2 * 3/4) = 1.5, and ln(3 + 1)^2."""
    batch = torch.tensor([[3.0, 1.0]] * 2).log().double(), np.array([[0], [0]]), np.array([1, 0])
    of: dict[str, Any] = {"groups": 1, "scoring": "softmax", "factor": 2.0}
    found, weighted = measured(*batch, "micro", [1.0, 1.0], **of)
    assert found == pytest.approx([1.5, 1.5, np.log(4) ** 2])
    assert weighted.item() == pytest.approx(2 * (0.05 * 1.5 + 0.03 * 1.5 + 0.01 * np.log(4) ** 2))
    found, _ = measured(*batch, "global", [10.0, 30.0], **of)
    assert found == pytest.approx([2 * (0.25 * 0.75 + 0.75 * 0.25)] * 2 + [np.log(4) ** 2])


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["micro", "global"])
def test_losses_and_gradients_of_a_batch_are_those_of_the_formula(scope: str, scoring: str, factor: float) -> None:
    """Eight tokens, three of them masked, that are sent to any experts at all: what counts is the choice that is dispatched."""
    generator = np.random.default_rng(5)
    z_TE, mask_T = generator.normal(0, 2, (8, EXPERTS)), np.array([1, 0, 1, 1, 0, 1, 1, 0.0])
    chosen_TK = np.stack([np.concatenate([4 * g + generator.permutation(4)[:2] for g in range(GROUPS)]) for _ in mask_T])
    previous_E = np.array([5, 1, 0, 2, 1, 1, 3, 3.0])
    load_E = np.bincount(chosen_TK.ravel()) if scope == "micro" else previous_E

    def total() -> float:
        return float(factor * COEFFICIENTS @ formula(z_TE, mask_T, scope, load_E, scoring))

    logits, of = torch.tensor(z_TE, requires_grad=True), {"groups": GROUPS, "scoring": scoring, "factor": factor}
    found, weighted = measured(logits, chosen_TK, mask_T, scope, previous_E.tolist(), **of)
    assert found == pytest.approx(formula(z_TE, mask_T, scope, load_E, scoring), rel=1e-12)
    assert weighted.item() == pytest.approx(total(), rel=1e-12)
    weighted.backward()
    slopes = np.array([slope(total, z_TE, entry) for entry in range(z_TE.size)]).reshape(z_TE.shape)
    assert runs.relative(np.asarray(logits.grad), slopes) < 1e-8
    assert (np.abs(slopes[mask_T == 0]).max() == 0) == (scope == "global"), "masked tokens count in scope micro alone"


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_a_step_reports_and_follows_the_formula(tiny: Path, scope: str) -> None:
    """Two steps without learning: figures of both, and the part that the losses have in the second one's gradients.

    In scope `global` the first step has uniform loads, so that its balance losses are 1; the second those of the whole first.
    """
    batches = [micro_batches(step, 2) for step in (0, 1)]
    gradients = []
    for rules in ({}, LOSSES | {"scope": scope, "layer_factors": FACTORS}):
        with runs.engine(tiny, {}, {"gradient": "topk"} | rules, "fp64", shape=SHAPE) as built:
            runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
            first = built.step(runs.on_device(batches[0]), 0.0)
            found, second = runs.gradients(built, batches[1])
            gradients.append(found)
    due, loads_LE = step_losses(tiny, batches[0], scope, np.ones((LAYERS, EXPERTS)))
    assert first.dispatched.numpy() == pytest.approx(loads_LE)
    assert loads_LE.std() > 5, "loads are far from uniform"
    if scope == "global":
        assert due[:, :2] == pytest.approx(1.0), "by hand"
    for report, losses_L3 in ((first, due), (second, step_losses(tiny, batches[1], scope, loads_LE)[0])):
        figures = torch.stack((report.balance, report.group_balance, report.z_loss), 1).numpy()
        assert figures == pytest.approx(losses_L3, rel=1e-10)
    weights = closed_form.weights_of(tiny)

    def total() -> float:
        losses_L3, _ = step_losses(tiny, batches[1], scope, loads_LE, weights)
        return float(FACTORS @ losses_L3 @ COEFFICIENTS)

    for name in (f"model.layers.{part}.weight" for part in ("0.mlp.gate", "1.mlp.gate", "0.self_attn.v_proj")):
        auxiliary = gradients[1][name] - gradients[0][name]
        for entry in np.random.default_rng(1).choice(auxiliary.size, 6, replace=False):
            far = abs(auxiliary.reshape(-1)[entry] - slope(total, weights[name], entry))
            assert far < 1e-7 * np.abs(auxiliary).max(), (name, entry)


Trained = tuple[np.ndarray, list[Block]]
"""Figures of every step [steps, 2 + 3 L]: loss, gradient norm and the three losses of each layer; this rank's weights."""


def trainings(folder: Path, jobs: list[tuple[dict[str, Any], str, int]]) -> list[Trained]:
    """Three steps in float64 of each (layout, scope, sequences of a micro-batch); updates are close to lr * gradient."""
    from moexpand.parallel import weights

    found = []
    for layout, scope, sequences in jobs:
        rules = LOSSES | {"gradient": "ste", "scope": scope, "layer_factors": FACTORS}
        with runs.engine(folder, layout, rules, "fp64", SHAPE) as built:
            runs.prepare(built, clip_grad=0.0, weight_decay=0.0, eps=10.0)
            rows = []
            for step in range(3):
                own = micro_batches(step, sequences)[built.ranks.data_rank :: built.ranks.data_size]
                report = built.step(runs.on_device(own), 1.0)
                rows.append([report.loss, report.grad_norm, *report.balance, *report.group_balance, *report.z_loss])
            held = weights.parts(built.stages, built.shape)
            blocks = [(part.name, part.shape, part.rows, part.columns, part.local.numpy().copy()) for part in held]
            found.append((np.array(rows, dtype=float), blocks))
    return found


def _distance(tiny: Path, found: list[Trained], due: Trained) -> tuple[float, float]:
    """Largest relative difference of a figure, and of a tensor's way in three steps."""
    start, mine, theirs = closed_form.weights_of(tiny), runs.merged([blocks for _, blocks in found]), runs.merged([due[1]])
    assert mine.keys() == theirs.keys() == start.keys()
    ways = [runs.relative(mine[name] - start[name], theirs[name] - start[name]) for name in start]
    return float(np.abs(found[0][0] / due[0] - 1).max()), max(ways)


def test_the_micro_batch_size_is_nothing_to_the_global_scope(tiny: Path) -> None:
    """Four, two and one micro-batches of the same sequences learn the same; scope `micro` tells them apart."""
    due, *others = trainings(tiny, [({}, "global", sequences) for sequences in (1, 2, 4)])
    assert due[0][0, 2:6] == pytest.approx(1.0)
    assert np.abs(due[0][1:, 2:6] - 1).min() > 1e-3
    assert all(max(_distance(tiny, [found], due)) < BOUND for found in others)
    one, four = trainings(tiny, [({}, "micro", sequences) for sequences in (1, 4)])
    assert min(*_distance(tiny, [four], one), *_distance(tiny, [one], due)) > 1e-3, "the bounds would notice"


def test_layouts_are_nothing_to_either_scope(tiny: Path) -> None:
    """At the same micro-batch size, a fully masked sequence in one of them."""
    layouts = {name: (TWO | GROUPED_TWO)[name] for name in ("EP2", "EP2 grouped_allgather", "TP2", "DP2", "CP2", "PP2")}
    due = trainings(tiny, [({}, scope, 2) for scope in ("micro", "global")])
    jobs = [(layout, scope, 2) for scope in ("micro", "global") for layout in layouts.values()]
    answers = run_on_ranks(trainings, 2, tiny, jobs)
    for number, (_, scope, _) in enumerate(jobs):
        distance = _distance(tiny, [answer[number] for answer in answers], due[scope == "global"])
        assert max(distance) < BOUND, (scope, list(layouts)[number % len(layouts)], distance)


def test_the_z_loss_of_float64_logits_is_exact() -> None:
    """Also where the share of unmasked tokens, here 3 of 5, has no short binary form."""
    from moexpand.parallel.balance import BalanceLosses, Routing
    from moexpand.parallel.shape import RouterRules

    logits, chosen = torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.long)
    routing = Routing(logits, logits.softmax(-1), chosen, torch.tensor([1, 0, 1, 1, 0]).bool())
    losses = BalanceLosses(RouterRules(), 1, 1, "softmax", SimpleNamespace(size=lambda: 1), 1.0)
    found, _ = losses(routing, torch.tensor([5, 0, 0, 0]), torch.ones(4))
    assert float(found[2]) == pytest.approx(3 * np.log(4) ** 2, rel=1e-15)
