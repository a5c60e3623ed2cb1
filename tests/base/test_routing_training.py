"""What routing learns from: router gradients, shares of experts that were not visited, balance loss, selection bias.

Every gradient is held against the slopes of its surrogate, written here in float64 for one token at a time, and, for softmax,
against the analytic formula; replayed experts in any order of the columns, selection biases and every dtype included.

Legend: T tokens, E experts, G groups, K experts a token visits, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.routing import balance_loss, group_probabilities, route, selection_bias_step, unpicked_shares
from tests.base.test_routing import CASES, GRADIENTS, Case, close, probabilities_of, weights_of

HIDDEN = 4


def surrogate_of(
    case: Case,
    logits: Sequence[float],
    at: Sequence[float],
    chosen: list[int],
    gains: Sequence[float],
    gradient: str,
    normalised: bool,
) -> float:
    """The loss of one token as the backward pass sees it; `at` are the logits that constants of the token are taken at.

    Args:
        gains: g of every expert; those that were not chosen have one under `default_vector` alone.
    """
    if gradient == "topk":
        weights = weights_of(logits, chosen, case.scoring, case.renormalise, case.scaling_factor)
        return sum(gains[expert] * weight for expert, weight in zip(chosen, weights, strict=True))
    shares = probabilities_of([z / case.temperature for z in logits], case.scoring)
    counted = range(case.experts) if gradient == "default_vector" else chosen
    factor = level_of(case, at, chosen) if normalised or gradient == "default_vector" else 1.0
    return case.scaling_factor * factor * sum(gains[expert] * shares[expert] for expert in counted)


def mass_of(case: Case, logits: Sequence[float], chosen: list[int]) -> float:
    """s^tau."""
    shares = probabilities_of([z / case.temperature for z in logits], case.scoring)
    return sum(shares[expert] for expert in chosen)


def level_of(case: Case, logits: Sequence[float], chosen: list[int]) -> float:
    """w / s^tau: by how much the surrogate of the chosen experts is raised, to add up to what their weights do."""
    return sum(weights_of(logits, chosen, case.scoring, case.renormalise)) / mass_of(case, logits, chosen)


def slopes(function: Callable[[list[float]], float], at: Sequence[float], step: float = 1e-5) -> list[float]:
    found = []
    for index in range(len(at)):
        up, down = list(at), list(at)
        up[index] += step
        down[index] -= step
        found.append((function(up) - function(down)) / (2 * step))
    return found


def same_gradient(case: Case, found: torch.Tensor, due_TE: Sequence[Sequence[float]], tolerance: float = 1e-8) -> None:
    """Tolerances are those of fp32 and of a gradient that is handed on in half precision, relative to 1 / s^tau or w / s^tau."""
    relative = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(case.dtype, 0.0)
    for row, due, logits, chosen in zip(found.double().numpy(), due_TE, case.logits().tolist(), case.chosen(), strict=True):
        largest = max(1.0 / mass_of(case, logits, chosen), level_of(case, logits, chosen), 5.0)
        absolute = (tolerance if case.dtype == torch.float64 else 1e-5) * largest
        np.testing.assert_allclose(row, due, rtol=relative, atol=absolute)


def gains_of(case: Case) -> torch.Tensor:
    """dL/dweight of every expert, [T, E]."""
    return torch.tensor(case.random(4).normal(0, 1, (case.tokens, case.experts)))


def shares_of(case: Case, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return unpicked_shares(logits, chosen, case.renormalise, case.scaling_factor, case.temperature, case.scoring)


def logit_gradient(case: Case, gradient: str, normalised: bool = False, default_vectors: bool = False) -> torch.Tensor:
    """dL/dz [T, E] by autograd; with two users of half precision logits the sum of their gradients is fp32."""
    logits, gains = case.logits().requires_grad_(), gains_of(case)
    used = logits.to(case.wide) if default_vectors else logits
    weights, chosen, _ = case.route(used, gradient, normalised)
    assert chosen.tolist() == case.chosen()
    loss = (weights.double() * gains.gather(1, chosen)).sum()
    if default_vectors:
        loss = loss + (gains * shares_of(case, used, chosen)).sum()
    (found,) = torch.autograd.grad(loss, logits)
    assert found.dtype == case.dtype
    return found


@pytest.mark.parametrize(("gradient", "normalised"), GRADIENTS)
def test_a_router_gradient_is_the_slope_of_its_surrogate(gradient: str, normalised: bool) -> None:
    """`default_vector` together with the shares of the experts that were not chosen."""

    @settings(max_examples=40, deadline=None)
    @given(CASES)
    def holds(case: Case) -> None:
        due = [
            slopes(lambda z, token=(row, picks, gains): surrogate_of(case, z, *token, gradient, normalised), row)
            for row, picks, gains in zip(case.logits().tolist(), case.chosen(), gains_of(case).tolist(), strict=True)
        ]
        same_gradient(case, logit_gradient(case, gradient, normalised, gradient == "default_vector"), due)

    holds()


@settings(max_examples=40, deadline=None)
@given(CASES, st.booleans())
def test_the_straight_through_gradient_is_the_formula_of_the_paper(case: Case, normalised: bool) -> None:
    """dL/dz_j = p_j / tau * ([j in S] g_j - sum over S of g_i p_i), p = softmax(z / tau) over all experts, or times w / s^tau."""
    case = replace(case, scoring="softmax")
    due = []
    for logits, chosen, g in zip(case.logits().tolist(), case.chosen(), gains_of(case).tolist(), strict=True):
        p = probabilities_of([z / case.temperature for z in logits], "softmax")
        shared = sum(g[i] * p[i] for i in chosen)
        factor = case.scaling_factor / case.temperature / (1.0 / level_of(case, logits, chosen) if normalised else 1.0)
        due.append([factor * p[j] * ((g[j] if j in chosen else 0.0) - shared) for j in range(case.experts)])
    same_gradient(case, logit_gradient(case, "ste", normalised), due, 1e-12)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_the_plain_gradient_of_softmax_weights_is_their_formula(case: Case) -> None:
    """w_j ([j in S] g_j - sum over S of g_i w_i), where w_j are probabilities over S, or over all experts unnormalised."""
    case = replace(case, scoring="softmax")
    due = []
    for logits, chosen, g in zip(case.logits().tolist(), case.chosen(), gains_of(case).tolist(), strict=True):
        w = probabilities_of(logits, "softmax")
        if case.renormalise:
            w = [w[j] / sum(w[i] for i in chosen) if j in chosen else 0.0 for j in range(case.experts)]
        shared = sum(g[i] * w[i] for i in chosen)
        due.append([case.scaling_factor * w[j] * ((g[j] if j in chosen else 0.0) - shared) for j in range(case.experts)])
    same_gradient(case, logit_gradient(case, "topk"), due, 1e-12)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_default_vectors_tell_of_every_expert_whether_it_beats_the_mixture(case: Case) -> None:
    """dL/dz_j = w p_j / (tau s^tau) * (g_j - sum over all of g_i p_i), from <dL/dy, y> with outputs and default vectors."""
    case = replace(case, scoring="softmax")
    random = case.random(5)
    slope_TH, outputs_TEH = random.normal(0, 1, (case.tokens, HIDDEN)), random.normal(0, 1, (case.tokens, case.experts, HIDDEN))
    means_EH = random.normal(0, 1, (case.experts, HIDDEN))
    logits_TE = case.logits().requires_grad_()
    wide_TE = logits_TE.to(case.wide)
    weights_TK, chosen_TK, _ = case.route(wide_TE, "default_vector")
    shares_TE = shares_of(case, wide_TE, chosen_TK)
    visited_TKH = torch.tensor(np.take_along_axis(outputs_TEH, chosen_TK.numpy()[..., None], 1))
    y_TH = (weights_TK.double()[..., None] * visited_TKH).sum(1) + shares_TE.double() @ torch.tensor(means_EH)
    (found,) = torch.autograd.grad((torch.tensor(slope_TH) * y_TH).sum(), logits_TE)
    due = []
    for token, (logits, chosen) in enumerate(zip(case.logits().tolist(), case.chosen(), strict=True)):
        p = probabilities_of([z / case.temperature for z in logits], "softmax")
        g = [float(slope_TH[token] @ (outputs_TEH[token, j] if j in chosen else means_EH[j])) for j in range(case.experts)]
        mixture = sum(g[i] * p[i] for i in range(case.experts))
        factor = case.scaling_factor / case.temperature * level_of(case, logits, chosen)
        due.append([factor * p[j] * (g[j] - mixture) for j in range(case.experts)])
    same_gradient(case, found, due, 1e-12)


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_without_default_vectors_their_gradient_is_the_normalised_straight_through_one(case: Case) -> None:
    assert torch.equal(logit_gradient(case, "default_vector"), logit_gradient(case, "ste", normalised=True))


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_shares_of_experts_that_were_not_chosen_are_those_of_the_definition(case: Case) -> None:
    """q_j = w p_j / s^tau times the scaling factor, and exactly 0 inside S."""
    found = shares_of(case, case.logits(), torch.tensor(case.chosen()))
    assert found.dtype == case.wide
    for row, logits, chosen in zip(found, case.logits().tolist(), case.chosen(), strict=True):
        p = probabilities_of([z / case.temperature for z in logits], case.scoring)
        level = level_of(case, logits, chosen)
        close(row[None], [[0.0 if j in chosen else case.scaling_factor * p[j] * level for j in range(case.experts)]])
        assert row[chosen].tolist() == [0.0] * case.top_k


def test_the_selection_bias_gets_no_gradient() -> None:
    for scoring in ("softmax", "sigmoid"):
        for gradient, normalised in GRADIENTS:
            logits, bias = Case().logits().requires_grad_(), torch.zeros(16, dtype=torch.float64, requires_grad=True)
            weights, _, _ = route(logits, 4, 4, gradient=gradient, normalised=normalised, scoring=scoring, bias_E=bias)
            weights.square().sum().backward()
            assert bias.grad is None or not bias.grad.any()
            assert logits.grad is not None
            assert logits.grad.any()


@pytest.mark.parametrize(("gradient", "reached"), [("ste", True), ("default_vector", True), ("topk", False)])
def test_experts_that_were_not_chosen_learn_only_from_the_dense_gradients(gradient: str, reached: bool) -> None:
    for scoring in ("softmax", "sigmoid"):
        case = Case(scoring=scoring)
        found, chosen = logit_gradient(case, gradient).abs(), torch.tensor(case.chosen())
        unchosen = torch.ones(found.shape, dtype=torch.bool).scatter(1, chosen, False)
        assert found[~unchosen].min() > 0
        if reached:
            assert found[unchosen].min() > 1e-6
        else:
            assert found[unchosen].max() < 1e-15


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_without_renormalisation_the_normalised_gradients_at_temperature_1_are_that_of_the_weights(case: Case) -> None:
    """The weights are p itself: nothing is scaled, the default vectors' shares are p of the others, and 0 is left to add up."""
    case = replace(case, scoring="softmax", renormalise=False, temperature=1.0)
    plain = logit_gradient(case, "topk").double()
    same_gradient(case, logit_gradient(case, "ste", normalised=True), plain.tolist(), 1e-13)
    same_gradient(case, logit_gradient(case, "default_vector"), plain.tolist(), 1e-13)
    shares = shares_of(case, case.logits(), torch.tensor(case.chosen()))
    for row, logits, chosen in zip(shares, case.logits().tolist(), case.chosen(), strict=True):
        p = probabilities_of(logits, "softmax")
        close(row[None], [[0.0 if j in chosen else case.scaling_factor * p[j] for j in range(case.experts)]])


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("gradient", ["ste", "default_vector"])
def test_the_normalised_gradients_have_the_magnitude_of_the_plain_one(gradient: str, renormalise: bool) -> None:
    """8 of 256 experts hold an eighth of the probability: where weights are divided by it, `ste` is as much smaller unscaled."""
    case = Case(tokens=40, size=32, groups=8, renormalise=renormalise)
    ratio = logit_gradient(case, gradient, normalised=True).norm() / logit_gradient(case, "topk").norm()
    assert 0.5 < ratio < 2, ratio
    plain = logit_gradient(case, "ste").norm() / logit_gradient(case, "topk").norm()
    assert (plain < 0.2) == renormalise, plain


def test_at_temperature_1_the_straight_through_gradient_is_that_of_unnormalised_weights() -> None:
    case = Case(size=6, groups=2, per_group=2, seed=3)
    plain = logit_gradient(replace(case, renormalise=False), "topk")
    np.testing.assert_allclose(logit_gradient(case, "ste"), plain, atol=1e-14)


LOADS = st.builds(
    lambda size, groups, per_group, tokens, seed: (size, groups, min(per_group, size), tokens, np.random.default_rng(seed)),
    size=st.integers(1, 6),
    groups=st.sampled_from([1, 2, 3, 8]),
    per_group=st.integers(1, 6),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)


@settings(max_examples=60, deadline=None)
@given(LOADS, st.booleans())
def test_the_balance_loss_is_the_mean_over_groups_of_the_loss_inside_each(
    load: tuple[int, int, int, int, np.random.Generator], counted: bool
) -> None:
    """Inside a group M / (T * K / G) * sum over its experts of n_e * mean p_e; its gradient goes to the probabilities alone."""
    size, groups, per_group, tokens, random = load
    logits = random.normal(0, 1.5, (tokens, groups * size))
    visits = np.zeros(groups * size)
    for _ in range(tokens):
        for group in range(groups):
            visits[group * size + random.permutation(size)[:per_group]] += 1
    inside = [
        [p for g in range(0, groups * size, size) for p in probabilities_of(row[g : g + size], "softmax")] for row in logits
    ]
    due = 0.0
    for group in range(groups):
        loss = 0.0
        for expert in range(group * size, (group + 1) * size):
            loss += visits[expert] * sum(row[expert] for row in inside) / tokens
        due += loss * size / (tokens * per_group) / groups
    sums = group_probabilities(torch.tensor(logits), groups).sum(0).requires_grad_()
    found = balance_loss(sums, torch.tensor(visits), torch.tensor(tokens) if counted else tokens, per_group * groups, groups)
    assert found.shape == ()
    np.testing.assert_allclose(found.item(), due, rtol=1e-12)
    (gradient,) = torch.autograd.grad(found, sums)
    np.testing.assert_allclose(gradient, visits * size / (tokens**2 * per_group * groups), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(LOADS)
def test_the_plain_balance_loss_is_the_definition(load: tuple[int, int, int, int, np.random.Generator]) -> None:
    """E / (T * K) * sum over the experts of n_e * mean p_e."""
    size, groups, per_group, tokens, random = load
    experts, top_k = size * groups, per_group * groups
    p_TE = [probabilities_of(row, "softmax") for row in random.normal(0, 1.5, (tokens, experts))]
    visits = np.bincount(np.concatenate([random.permutation(experts)[:top_k] for _ in range(tokens)]), minlength=experts)
    due = sum(visits[e] * sum(p[e] for p in p_TE) / tokens for e in range(experts)) * experts / (tokens * top_k)
    found = balance_loss(torch.tensor(p_TE, dtype=torch.float64).sum(0), torch.tensor(visits), tokens, top_k)
    np.testing.assert_allclose(float(found), due, rtol=1e-12)


@pytest.mark.parametrize("tokens", [1, 10, 4_000_000])
@pytest.mark.parametrize(("experts", "groups", "top_k"), [(8, 1, 2), (16, 4, 4), (16, 4, 8), (64, 8, 64), (4, 4, 4)])
def test_the_balance_loss_is_1_at_uniform_load(experts: int, groups: int, top_k: int, tokens: int) -> None:
    counts = torch.full((experts,), tokens * top_k / experts)
    for scope in {1, groups}:
        sums = torch.full((experts,), tokens * scope / experts)
        for number in (tokens, torch.tensor(tokens)):
            assert float(balance_loss(sums, counts, number, top_k, scope)) == pytest.approx(1.0, rel=1e-5)


def test_the_balance_loss_is_experts_over_k_at_collapse() -> None:
    tokens, experts, top_k = 10, 8, 2
    sums, counts = torch.zeros(experts), torch.zeros(experts)
    sums[:2], counts[:2] = tokens / 2, tokens
    assert float(balance_loss(sums, counts, tokens, top_k)) == pytest.approx(experts / top_k)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 64),
    groups=st.sampled_from([1, 2, 3, 8]),
    highest=st.sampled_from([0, 2, 50, 100_000]),
    rate=st.sampled_from([0.001, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_the_selection_bias_rises_below_the_mean_load_of_the_group_and_falls_above(
    size: int, groups: int, highest: int, rate: float, dtype: torch.dtype, seed: int
) -> None:
    loads = np.random.default_rng(seed).integers(0, highest + 1, groups * size)
    loads[:size] = highest
    found = selection_bias_step(torch.tensor(loads, dtype=dtype), groups, rate)
    due = []
    for expert in range(groups * size):
        of_group = loads[expert // size * size : (expert // size + 1) * size].tolist()
        behind = sum(of_group) - size * int(loads[expert])
        due.append(rate * ((behind > 0) - (behind < 0)))
    np.testing.assert_allclose(found, due, rtol=1e-6)
