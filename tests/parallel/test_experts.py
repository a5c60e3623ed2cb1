"""Experts over stacked weights equal a loop over tokens and experts in float64, however uneven their loads are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.parallel.expert_mlp import InnerSums, expert_mlp
from moexpand.parallel.rows import Rows

HIDDEN, INNER = 16, 8
BLOCKS, SINGLE = 1, 10**9
"""Sizes of a row with which the blocks of a CPU are worth their padding and with which they are not."""


def choices(generator: np.random.Generator, tokens: int, experts: int, visits: int, load: str) -> torch.Tensor:
    """Experts that every token visits, [U, C]: none twice, spread by `load`."""
    if load == "same":  # every token the same experts
        row = generator.permutation(experts)[:visits]
        return torch.from_numpy(np.tile(row, (tokens, 1)))
    weights = np.ones(experts) if load == "even" else generator.uniform(0, 1, experts) ** 8 + 1e-9
    rows = [generator.choice(experts, visits, replace=False, p=weights / weights.sum()) for _ in range(tokens)]
    return torch.from_numpy(np.array(rows).reshape(tokens, visits))


def by_loop(
    x: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The formula, one visit after the other."""
    outputs = []
    for token in range(len(x)):
        total = torch.zeros(HIDDEN, dtype=x.dtype)
        for visit, expert in enumerate(chosen[token].tolist()):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            total = total + weights[token, visit] * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
        outputs.append(total)
    return torch.stack(outputs)


def _scale_of_weights(exact: list[torch.Tensor], chosen: torch.Tensor, upstream: torch.Tensor) -> float:
    """The gradient of a weight is one product <upstream, E(x)>, whose terms may cancel: its errors are of the vectors' size."""
    with torch.no_grad():
        x, _, gate_up, down = exact
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        visits = [by_loop(x, ones, gate_up, down, chosen[:, [visit]]) for visit in range(chosen.shape[1])]
        return float((torch.stack(visits).norm(dim=2) * upstream.double().norm(dim=1)).max())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 24),
    experts=st.sampled_from([1, 3, 8, 32]),
    load=st.sampled_from(["even", "skewed", "same"]),
    row_size=st.sampled_from([BLOCKS, SINGLE]),
    sorted_rows=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_outputs_and_gradients(
    seed: int, tokens: int, experts: int, load: str, row_size: int, sorted_rows: bool, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    visits = min(experts, int(generator.integers(1, 5)))
    chosen = choices(generator, tokens, experts, visits, load)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.from_numpy(generator.standard_normal(shape)).to(dtype)
        return values.requires_grad_()

    x, gate_up, down = leaf(tokens, HIDDEN), leaf(experts, 2 * INNER, HIDDEN), leaf(experts, HIDDEN, INNER)
    weights = torch.from_numpy(generator.uniform(0, 1, (tokens, visits))).to(torch.promote_types(dtype, torch.float32))
    weights.requires_grad_()
    upstream = torch.from_numpy(generator.standard_normal((tokens, HIDDEN))).to(dtype)

    sums = InnerSums(down)
    if sorted_rows:
        order = torch.argsort(chosen.flatten(), stable=True)
        rows = Rows.given(torch.bincount(chosen.flatten(), minlength=experts), torch.device("cpu"), row_size)
        outputs = expert_mlp(x[order // visits], weights.flatten()[order], gate_up, down, rows, sums)
        y = torch.zeros(tokens, HIDDEN, dtype=dtype).index_add(0, order // visits, outputs)
    else:
        y = expert_mlp(x, weights, gate_up, down, Rows.sort(chosen, experts, row_size), sums)
    y.backward(upstream)

    exact = [each.detach().double().requires_grad_() for each in (x, weights, gate_up, down)]
    expected = by_loop(*exact, chosen)
    expected.backward(upstream.double())
    bound = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float64: 1e-12}[dtype]
    pairs = [(y, expected)] + [(mine.grad, other.grad) for mine, other in zip((x, weights, gate_up, down), exact, strict=True)]
    sizes = [1.0, 1.0, _scale_of_weights(exact, chosen, upstream), 1.0, 1.0]
    for (mine, other), size in zip(pairs, sizes, strict=True):
        assert mine is not None
        assert other is not None
        assert torch.isfinite(mine).all()
        assert (mine.double() - other).abs().max() <= bound * max(size, other.abs().max().item())

    counts = torch.bincount(chosen.flatten(), minlength=experts)
    assert sums.rows.tolist() == counts.tolist()
    unvisited = counts == 0
    assert not gate_up.grad[unvisited].any()
    assert not sums.sums[unvisited].any()


@pytest.mark.parametrize("row_size", [BLOCKS, SINGLE])
@pytest.mark.parametrize("sorted_rows", [False, True])
def test_no_token_at_all(row_size: int, sorted_rows: bool) -> None:
    """A rank whose experts are visited by nobody."""
    gate_up, down = torch.randn(4, 2 * INNER, HIDDEN, requires_grad=True), torch.randn(4, HIDDEN, INNER, requires_grad=True)
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    weights = torch.zeros(0) if sorted_rows else torch.zeros(0, 2)
    if sorted_rows:
        rows = Rows.given(torch.zeros(4, dtype=torch.int64), torch.device("cpu"), row_size)
    else:
        rows = Rows.sort(torch.zeros(0, 2, dtype=torch.int64), 4, row_size)
    output = expert_mlp(x, weights.requires_grad_(), gate_up, down, rows, InnerSums(down))
    assert output.shape == (0, HIDDEN)
    output.sum().backward()
    assert gate_up.grad is not None
    assert down.grad is not None
    assert not gate_up.grad.any()
    assert not down.grad.any()


def test_blocks_are_chosen_by_what_they_save() -> None:
    """Small experts with even loads run as one batch, large or uneven ones by themselves."""
    even = torch.full((512,), 32)
    assert Rows.given(even, torch.device("cpu"), 192 * 48).capacities == [32]
    uneven = even.clone()
    uneven[100] = 4000
    blocks = Rows.given(uneven, torch.device("cpu"), 192 * 48).capacities
    assert blocks is not None
    assert len(blocks) > 1
    assert max(blocks) == 4000
    assert sum(blocks) < 10 * 4000
    assert Rows.given(uneven, torch.device("cpu"), 4096 * 1536).capacities is None
