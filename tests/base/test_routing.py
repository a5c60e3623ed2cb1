"""Grouped top-k routing and its two gradients, against formulas written here in float64 numpy and against finite differences.

Legend: T tokens, E experts, G groups, K experts a token visits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.routing import balance_loss, route, select_experts

TOKENS = 3


@dataclass(frozen=True)
class Case:
    experts: int
    groups: int
    top_k: int
    renormalise: bool
    temperature: float
    seed: int

    def logits(self) -> np.ndarray:
        return np.random.default_rng(self.seed).normal(0, 1.5, (TOKENS, self.experts))

    def upstream(self) -> np.ndarray:
        """dL/dweight, [T, K]."""
        return np.random.default_rng(self.seed + 1).normal(0, 1, (TOKENS, self.top_k))

    def route(self, logits: torch.Tensor, gradient: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return route(logits, self.top_k, self.groups, self.renormalise, gradient=gradient, temperature=self.temperature)

    def logit_gradient(self, gradient: str) -> tuple[np.ndarray, np.ndarray]:
        """dL/dz [T, E] for the upstream gradient, by autograd, and the chosen experts."""
        logits = torch.tensor(self.logits(), requires_grad=True)
        weights, chosen, _ = self.route(logits, gradient)
        (weights * torch.tensor(self.upstream())).sum().backward()
        assert logits.grad is not None
        return logits.grad.numpy(), chosen.numpy()


@st.composite
def cases(draw: Any) -> Case:
    """One group, as many groups as chosen experts, two of a group, groups of one expert: all of it comes up."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    size = draw(st.integers(1, 6))
    per_group = draw(st.integers(1, size))
    temperature = draw(st.sampled_from([1.0, 0.5, 2.0]))
    return Case(groups * size, groups, groups * per_group, draw(st.booleans()), temperature, draw(st.integers(0, 10_000)))


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def choose(scores: np.ndarray, groups: int, per_group: int) -> list[int]:
    """The definition, one token at a time: in every group the best, the lower index first among equals."""
    size, chosen = len(scores) // groups, []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        chosen += sorted(members, key=lambda expert: (-scores[expert], expert))[:per_group]
    return chosen


@settings(max_examples=60, deadline=None)
@given(cases())
def test_weights_and_choice_are_those_of_the_definition(case: Case) -> None:
    weights, chosen, probabilities = case.route(torch.tensor(case.logits()), "topk")
    due = softmax(case.logits())
    np.testing.assert_allclose(probabilities, due, atol=1e-14)
    for token in range(TOKENS):
        experts = choose(due[token], case.groups, case.top_k // case.groups)
        assert chosen[token].tolist() == experts
        picked = due[token][experts]
        np.testing.assert_allclose(weights[token], picked / picked.sum() if case.renormalise else picked, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_both_gradients_have_bitwise_the_same_forward_value(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor(case.logits(), dtype=dtype, requires_grad=True)
        for topk, ste in zip(case.route(logits, "topk"), case.route(logits, "ste"), strict=True):
            assert torch.equal(topk, ste)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_straight_through_gradient_is_the_analytic_formula(case: Case) -> None:
    """dL/dz_j = p_j / tau * ([j in S] g_j - sum over S of g_i p_i) with p = softmax(z / tau) over all experts."""
    found, chosen = case.logit_gradient("ste")
    p_TE, g_TK = softmax(case.logits() / case.temperature), case.upstream()
    for token in range(TOKENS):
        experts = chosen[token]
        dense = np.zeros(case.experts)
        dense[experts] = g_TK[token]
        shared = (g_TK[token] * p_TE[token][experts]).sum()
        np.testing.assert_allclose(found[token], p_TE[token] / case.temperature * (dense - shared), atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_straight_through_gradient_is_the_slope_of_its_surrogate(case: Case) -> None:
    found, chosen = case.logit_gradient("ste")

    def surrogate(logits: np.ndarray) -> float:
        return float((np.take_along_axis(softmax(logits / case.temperature), chosen, -1) * case.upstream()).sum())

    np.testing.assert_allclose(found, _slopes(surrogate, case.logits()), atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_plain_gradient_is_the_slope_of_the_forward_value(case: Case) -> None:
    """Logits are an ordinary distance apart, so the choice stays within the step of 1e-6."""
    found, _ = case.logit_gradient("topk")

    def forward(logits: np.ndarray) -> float:
        weights, _, _ = case.route(torch.tensor(logits), "topk")
        return float((weights.numpy() * case.upstream()).sum())

    np.testing.assert_allclose(found, _slopes(forward, case.logits()), atol=1e-8)


def _slopes(function: Any, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    slopes = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (function(up) - function(down)) / (2 * step)
    return slopes


def test_experts_that_were_not_chosen_learn_only_from_the_straight_through_gradient() -> None:
    case = Case(experts=16, groups=4, top_k=4, renormalise=True, temperature=1.0, seed=0)
    for gradient, reached in (("ste", True), ("topk", False)):
        found, chosen = case.logit_gradient(gradient)
        unchosen = np.ones_like(found, dtype=bool)
        np.put_along_axis(unchosen, chosen, False, -1)
        assert (np.abs(found[unchosen]).max() > 1e-6) == reached
        assert reached or np.abs(found[unchosen]).max() < 1e-15
        assert np.abs(found[~unchosen]).min() > 0


def test_at_temperature_1_the_straight_through_gradient_is_that_of_unnormalised_weights() -> None:
    normalised = Case(experts=12, groups=2, top_k=4, renormalise=True, temperature=1.0, seed=3)
    plain = Case(experts=12, groups=2, top_k=4, renormalise=False, temperature=1.0, seed=3)
    np.testing.assert_allclose(normalised.logit_gradient("ste")[0], plain.logit_gradient("topk")[0], atol=1e-14)


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_equal_scores_go_to_the_lowest_index(top_k: int) -> None:
    scores = torch.zeros(2, 64)
    scores[1, 5] = scores[1, 37] = scores[1, 36] = 1.0
    chosen = select_experts(scores, top_k, groups=2).tolist()
    half = top_k // 2
    assert chosen[0] == [*range(half), *range(32, 32 + half)]
    assert chosen[1] == [*[5, 0, 1, 2][:half], *[36, 37, 32, 33][:half]]


def test_half_precision_logits_are_routed_in_fp32() -> None:
    logits = torch.tensor(Case(64, 8, 8, True, 1.0, 0).logits()).bfloat16()
    weights, chosen, probabilities = route(logits, 8, 8)
    wide = route(logits.float(), 8, 8)
    assert weights.dtype == probabilities.dtype == torch.float32
    assert torch.equal(weights, wide[0])
    assert torch.equal(chosen, wide[1])


def test_huge_logits_stay_finite() -> None:
    weights, _, probabilities = route(torch.tensor([[1e4, -1e4, 3e38, 0.0]]), 2, 2)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(probabilities).all()


def test_scaling_factor_multiplies_the_weights() -> None:
    logits = torch.tensor(Case(16, 1, 4, True, 1.0, 0).logits())
    np.testing.assert_allclose(route(logits, 4, scaling_factor=2.5)[0].sum(-1), 2.5)


def test_balance_loss_is_1_at_uniform_load_and_experts_over_k_at_collapse() -> None:
    tokens, experts, top_k = 10, 8, 2
    uniform = balance_loss(
        torch.full((experts,), tokens / experts), torch.full((experts,), tokens * top_k / experts), tokens, top_k
    )
    assert float(uniform) == pytest.approx(1.0)
    sums, counts = torch.zeros(experts), torch.zeros(experts)
    sums[:2], counts[:2] = tokens / 2, tokens
    assert float(balance_loss(sums, counts, tokens, top_k)) == pytest.approx(experts / top_k)
