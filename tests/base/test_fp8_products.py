"""Products in FP8, forward and backward, against formulas written out in float64 with operands that the test rounds itself."""

import numpy as np
import pytest
import torch

from moexpand.base.fp8_products import fp8_grouped_linear, fp8_linear
from tests.base.test_block_fp8 import NUMBERS, reference


def rounded(x: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    """A matrix in FP8, by the search through all numbers."""
    values = x.detach().double().numpy()
    bits, scales = reference(values, block)
    own = np.kron(scales, np.ones(block))[: values.shape[0], : values.shape[1]]
    return np.copysign(NUMBERS[bits] * own, values)


def due(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w = rounded(weight, (128, 128))
    y = rounded(x, (1, 128)) @ w.T
    d_x = rounded(gradient, (1, 128)) @ w
    d_w = rounded(gradient, (128, 1)).T @ rounded(x, (128, 1))
    return y, d_x, d_w


def leaf(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp(
        torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator)
    )
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_both_gradients(dtype: torch.dtype) -> None:
    x, weight = leaf(150, 140, dtype=dtype, seed=0), leaf(130, 140, dtype=dtype, seed=1)
    gradient = leaf(150, 130, dtype=dtype, seed=2).detach()
    y = fp8_linear(x, weight)
    y.backward(gradient)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}[dtype]
    assert x.grad is not None
    assert weight.grad is not None
    for mine, other in zip((y, x.grad, weight.grad), due(x, weight, gradient), strict=True):
        assert mine.dtype == dtype
        assert np.abs(mine.detach().double().numpy() - other).max() <= bound * np.abs(other).max()


def test_fp8_is_near_the_exact_product_and_not_the_same() -> None:
    x, weight = leaf(64, 256, dtype=torch.float32, seed=3), leaf(96, 256, dtype=torch.float32, seed=4)
    exact = (x @ weight.T).detach()
    error = (fp8_linear(x, weight).detach() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.06


def test_leading_dimensions_stay() -> None:
    x, weight = leaf(3, 5, 32, dtype=torch.float32, seed=5), leaf(16, 32, dtype=torch.float32, seed=6)
    assert torch.equal(fp8_linear(x, weight), fp8_linear(x.flatten(0, 1), weight).view(3, 5, 16))


@pytest.mark.parametrize("rows", [[7, 0, 130, 3], [0, 0, 0, 140], [140, 0, 0, 0]], ids=str)
def test_each_expert_is_a_linear_of_its_own(rows: list[int]) -> None:
    x, weights = leaf(140, 48, dtype=torch.float32, seed=7), leaf(4, 40, 48, dtype=torch.float32, seed=8)
    gradient = leaf(140, 40, dtype=torch.float32, seed=9).detach()
    fp8_grouped_linear(x, weights, rows).backward(gradient)
    assert x.grad is not None
    assert weights.grad is not None
    start = 0
    for expert, count in enumerate(rows):
        part = slice(start, start + count)
        start += count
        if not count:
            assert not weights.grad[expert].any()
            continue
        _, d_x, d_w = due(x[part], weights[expert], gradient[part])
        np.testing.assert_allclose(x.grad[part].numpy(), d_x, atol=1e-5 * np.abs(d_x).max())
        np.testing.assert_allclose(weights.grad[expert].numpy(), d_w, atol=1e-5 * np.abs(d_w).max())
