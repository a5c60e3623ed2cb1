"""Grouped top-k routing: which experts a token visits and with what weight, against a slow float64 definition.

The definition is written here once more from the formulas, one token at a time; `test_routing_training.py` holds the gradients
against it. Half precision logits are routed in fp32, ties go to the lowest index, and no gradient changes a forward value.

Legend: T tokens, E experts, G groups, K experts a token visits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moexpand.base.routing import group_probabilities, route, router_probabilities, select_experts

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]
SCORINGS = ["softmax", "sigmoid"]
GRADIENTS = [("topk", False), ("ste", False), ("ste", True), ("default_vector", False)]
"""`gradient` and `normalised` of `route`."""


def scores_of(logits: Sequence[float], scoring: str) -> list[float]:
    if scoring == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    best = max(logits)
    exponentials = [math.exp(z - best) for z in logits]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def probabilities_of(logits: Sequence[float], scoring: str) -> list[float]:
    scores = scores_of(logits, scoring)
    total = sum(scores)
    return [score / total for score in scores]


def choose(scores: Sequence[float], groups: int, per_group: int) -> list[int]:
    """In every group the best, from the best down, the lower index first among equals."""
    size, chosen = len(scores) // groups, []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        chosen += sorted(members, key=lambda expert: (-scores[expert], expert))[:per_group]
    return chosen


def weights_of(
    logits: Sequence[float], chosen: Sequence[int], scoring: str, renormalise: bool = True, scaling_factor: float = 1.0
) -> list[float]:
    scores = scores_of(logits, scoring)
    total = sum(scores[expert] for expert in chosen) if renormalise else 1.0
    return [scaling_factor * scores[expert] / total for expert in chosen]


@dataclass(frozen=True)
class Case:
    """A router, its logits and, with `replay`, the experts that it is told to visit."""

    tokens: int = 3
    size: int = 4
    groups: int = 4
    per_group: int = 1
    scoring: str = "softmax"
    renormalise: bool = True
    scaling_factor: float = 1.0
    temperature: float = 1.0
    bias_scale: float = 0.0
    replay: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def experts(self) -> int:
        return self.size * self.groups

    @property
    def top_k(self) -> int:
        return self.per_group * self.groups

    @property
    def wide(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    def logits(self) -> torch.Tensor:
        """No two of a token are equal, in any dtype."""
        random = self.random(0)
        steps = np.stack([random.choice(np.arange(-128, 128), self.experts, replace=False) for _ in range(self.tokens)])
        return torch.tensor(steps / 64 + random.uniform(-0.002, 0.002, steps.shape)).to(self.dtype)

    def bias(self) -> torch.Tensor | None:
        drawn = torch.tensor(self.random(1).normal(0, self.bias_scale, self.experts), dtype=self.wide)
        return drawn if self.bias_scale else None

    def chosen(self) -> list[list[int]]:
        """By the definition, or any experts of every group in any order of the columns for a replay."""
        random = self.random(2)
        if self.replay:
            picks = [
                [g * self.size + m for g in range(self.groups) for m in random.permutation(self.size)[: self.per_group]]
                for _ in range(self.tokens)
            ]
            return [random.permutation(row).tolist() for row in picks]
        bias = self.bias()
        rows = []
        for logits in self.logits().tolist():
            scores = scores_of(logits, self.scoring)
            if bias is not None:
                scores = [score + added for score, added in zip(scores, bias.tolist(), strict=True)]
                assume(np.diff(sorted(scores)).min(initial=1.0) > 5e-7)
            rows.append(choose(scores, self.groups, self.per_group))
        return rows

    def route(
        self, logits: torch.Tensor, gradient: str = "topk", normalised: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return route(
            logits,
            self.top_k,
            self.groups,
            self.renormalise,
            self.scaling_factor,
            gradient,
            self.temperature,
            normalised,
            self.scoring,
            self.bias(),
            torch.tensor(self.chosen()) if self.replay else None,
        )


SIZES = st.sampled_from([1, 2, 3, 5, 6])
CASES = st.builds(
    lambda size, per_group, **rest: Case(size=size, per_group=per_group(size), **rest),
    tokens=st.integers(1, 40),
    size=SIZES,
    groups=st.sampled_from([1, 2, 3, 4, 8]),
    per_group=st.sampled_from([lambda size: 1, lambda size: min(2, size), lambda size: (size + 1) // 2, lambda size: size]),
    scoring=st.sampled_from(SCORINGS),
    renormalise=st.booleans(),
    scaling_factor=st.sampled_from([1.0, 2.5]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    bias_scale=st.sampled_from([0.0, 0.05, 1.0]),
    replay=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
"""K = G, K = 2 G, K = E, groups of one expert and one group: all of it comes up."""


def close(found: torch.Tensor, due: Sequence[Sequence[float]]) -> None:
    tolerance = 1e-12 if found.dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(found.detach().double().numpy(), np.array(due), rtol=tolerance, atol=tolerance)


@settings(max_examples=120, deadline=None)
@given(CASES)
def test_weights_choice_and_probabilities_are_those_of_the_definition(case: Case) -> None:
    weights, chosen, probabilities = case.route(case.logits())
    assert (weights.dtype, chosen.dtype, probabilities.dtype) == (case.wide, torch.int64, case.wide)
    assert chosen.tolist() == case.chosen()
    rows = case.logits().tolist()
    close(probabilities, [probabilities_of(row, case.scoring) for row in rows])
    options = (case.scoring, case.renormalise, case.scaling_factor)
    close(weights, [weights_of(row, picks, *options) for row, picks in zip(rows, case.chosen(), strict=True)])


@settings(max_examples=60, deadline=None)
@given(CASES, st.sampled_from([1.0, 8.0]))
def test_every_gradient_has_bitwise_the_same_forward_value(case: Case, spread: float) -> None:
    logits = (case.logits() * spread).requires_grad_()
    plain = case.route(logits)
    for gradient, normalised in GRADIENTS[1:]:
        for found, due in zip(case.route(logits, gradient, normalised), plain, strict=True):
            assert torch.equal(found, due), gradient


@settings(max_examples=40, deadline=None)
@given(CASES, st.sampled_from(HALVES))
def test_half_precision_logits_are_routed_in_fp32(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    for found, due in zip(case.route(case.logits()), case.route(case.logits().float()), strict=True):
        assert found.dtype == due.dtype
        assert torch.equal(found, due)


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_replayed_experts_keep_their_weights_in_any_order_of_the_columns(case: Case) -> None:
    case = replace(case, replay=False)
    weights, chosen, probabilities = case.route(case.logits())
    order = torch.tensor(case.random(3).permutation(case.top_k))
    again = route(
        case.logits(),
        case.top_k,
        case.groups,
        case.renormalise,
        case.scaling_factor,
        scoring=case.scoring,
        chosen_TK=chosen[:, order],
    )
    close(again[0], weights[:, order].tolist())
    assert torch.equal(again[1], chosen[:, order])
    assert torch.equal(again[2], probabilities)


def test_the_selection_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    for bias, picks in (([-5.0, 0.0, 0.0, 5.0], [3, 1]), ([0.0, -5.0, -5.0, -5.0], [0, 1]), ([-5.0, -5.0, 0.0, 0.0], [2, 3])):
        for scoring in SCORINGS:
            weights, chosen, _ = route(logits, 2, scoring=scoring, bias_E=torch.tensor(bias))
            assert chosen.tolist() == [picks]
            close(weights, [weights_of(logits[0].tolist(), picks, scoring)])


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_probabilities_inside_groups_are_those_of_the_definition(case: Case) -> None:
    found = group_probabilities(case.logits(), case.groups, case.scoring)
    assert found.dtype == case.wide
    cuts = range(0, case.experts, case.size)
    close(
        found,
        [[p for g in cuts for p in probabilities_of(row[g : g + case.size], case.scoring)] for row in case.logits().tolist()],
    )
    close(found.unflatten(1, (case.groups, -1)).sum(-1), [[1.0] * case.groups] * case.tokens)
    wide = case.logits().to(case.wide)
    close(router_probabilities(wide, case.scoring), [probabilities_of(row, case.scoring) for row in wide.tolist()])


def same_choice(run: Callable[[], torch.Tensor], due: list[list[int]]) -> None:
    found = run()
    assert found.dtype == torch.int64
    assert found.tolist() == due
    assert all(torch.equal(run(), found) for _ in range(2))


@settings(max_examples=120, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 7, 16, 33, 64, 150, 300]),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 12),
    levels=st.sampled_from([1, 2, 3, 40]),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equal_scores_go_to_the_lowest_index(
    size: int, groups: int, per_group: int, levels: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    """Also the whole group, ties on both sides of the last pick, and zeros of either sign."""
    per_group = min(per_group, size)
    drawn = np.random.default_rng(seed).integers(0, levels, (12, groups * size))
    drawn[0] = 1
    scores = torch.tensor(drawn / 4 - 0.25).to(dtype)
    scores[1, ::2] *= -0.0
    if strided:
        scores = scores.T.contiguous().T
    due = [choose(row, groups, per_group) for row in scores.tolist()]
    same_choice(lambda: select_experts(scores, per_group * groups, groups), due)


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([2, 3, 8, 20, 64]), leaders=st.integers(0, 5), equals=st.integers(2, 8), seed=st.integers(0, 10_000))
def test_a_tie_across_the_last_pick_takes_the_lowest_indices(size: int, leaders: int, equals: int, seed: int) -> None:
    """A few experts lead, some are equal behind them, and any number of these still fits."""
    random = np.random.default_rng(seed)
    scores = torch.zeros(8, 2 * size)
    for row in scores.view(-1, size):
        order = random.permutation(size)
        row[order[:leaders].copy()] = torch.arange(2.0, 2.0 + len(order[:leaders]))
        row[order[leaders : leaders + equals].copy()] = 1.0
    for per_group in range(1, min(size, leaders + equals + 1) + 1):
        due = [choose(row, 2, per_group) for row in scores.tolist()]
        same_choice(lambda per_group=per_group: select_experts(scores, 2 * per_group, 2), due)


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_rows_of_equal_scores_send_every_group_to_its_first_experts(top_k: int) -> None:
    scores = torch.zeros(2, 64)
    scores[1, 5] = scores[1, 37] = scores[1, 36] = 1.0
    chosen = select_experts(scores, top_k, groups=2).tolist()
    half = top_k // 2
    assert chosen[0] == [*range(half), *range(32, 32 + half)]
    assert chosen[1] == [*[5, 0, 1, 2][:half], *[36, 37, 32, 33][:half]]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_equal_logits_tie_and_go_to_the_lowest_index(scoring: str) -> None:
    """Copies of one expert have equal logits, and logits that were rounded to bf16 are often equal."""

    @settings(max_examples=80, deadline=None)
    @given(
        size=st.sampled_from([2, 3, 5, 8, 16, 60]),
        groups=st.sampled_from([1, 2, 4]),
        per_group=st.integers(1, 8),
        step=st.sampled_from([0.0, 0.5, 1 / 16]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 10_000),
    )
    def holds(size: int, groups: int, per_group: int, step: float, dtype: torch.dtype, seed: int) -> None:
        drawn = torch.tensor(np.random.default_rng(seed).normal(0, 1.5, (7, groups * size)))
        rounded = (drawn / step).round() * step if step else drawn[:, :1].expand(drawn.shape)
        logits = rounded.bfloat16().to(dtype)
        picks = min(per_group, size)
        due = [choose(scores_of(row, scoring), groups, picks) for row in logits.tolist()]
        same_choice(lambda: route(logits, picks * groups, groups, scoring=scoring)[1], due)

    holds()


@pytest.mark.parametrize("bias", [None, 0.25])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_equal_logits_tie_at_every_place_of_a_row(scoring: str, bias: float | None) -> None:
    """Also where a row is no multiple of what the processor computes at once, and with equal selection biases."""
    for experts in (17, 33, 60):
        bias_E = None if bias is None else torch.full((experts,), bias)
        for logit in np.arange(-6, 6, 1 / 16).tolist():
            chosen = route(torch.full((1, experts), logit), 4, scoring=scoring, bias_E=bias_E)[1]
            assert chosen.tolist() == [[0, 1, 2, 3]], (experts, logit)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_tokens_are_routed_to_nothing(scoring: str) -> None:
    for top_k in (4, 8, 16):
        weights, chosen, probabilities = route(torch.zeros(0, 16), top_k, 4, scoring=scoring)
        assert (weights.shape, chosen.shape, probabilities.shape) == ((0, top_k), (0, top_k), (0, 16))
        assert chosen.dtype == torch.int64


@pytest.mark.parametrize("scoring", SCORINGS)
def test_huge_logits_stay_finite(scoring: str) -> None:
    weights, _, probabilities = route(torch.tensor([[1e4, -1e4, 3e38, 0.0]]), 2, 2, scoring=scoring)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(probabilities).all()


@pytest.mark.parametrize(
    ("scoring", "logits", "bias", "replay"),
    [
        ("softmax", [0.0, -150.0, -152.0, -151.0], None, [3, 1]),
        ("softmax", [0.0, -150.0, -152.0, -151.0], [-9.0, 0.0, -1.0, 1.0], None),
        ("sigmoid", [-150.0, -151.0, -153.0, -152.0], None, None),
    ],
    ids=["replay", "bias", "sigmoid"],
)
def test_experts_with_scores_too_small_for_fp32_still_share_the_weight(
    scoring: str, logits: list[float], bias: list[float] | None, replay: list[int] | None
) -> None:
    """The ratio of their scores is an ordinary number."""
    bias_E = None if bias is None else torch.tensor(bias)
    chosen_TK = None if replay is None else torch.tensor([replay])
    weights, chosen, _ = route(torch.tensor([logits]), 2, scoring=scoring, bias_E=bias_E, chosen_TK=chosen_TK)
    close(weights, [weights_of(logits, chosen[0].tolist(), scoring)])


def test_scaling_factor_multiplies_the_weights() -> None:
    case = Case(size=16, groups=1, per_group=4)
    np.testing.assert_allclose(route(case.logits(), 4, scaling_factor=2.5)[0].sum(-1), 2.5)
