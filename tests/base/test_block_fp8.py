"""Blocks of FP8 against a search through all 256 numbers of e4m3 and all powers of two, in float64 and bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.block_fp8 import ACTIVATIONS, WEIGHTS, block_scales, dequantise, quantise


def e4m3_of(bits: int) -> float:
    """The number of a byte, from the format's definition: sign, four bits of exponent with bias 7, three of mantissa."""
    sign, exponent, mantissa = (-1.0 if bits & 128 else 1.0), bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


NUMBERS = np.array([e4m3_of(bits) for bits in range(127)])
"""All that are not negative, ascending; a byte is its place."""


def nearest(value: float) -> int:
    """The byte of the nearest number, ties to the even byte; the sign apart."""
    if np.isnan(value) or np.isinf(value):
        return 127
    distance = np.abs(NUMBERS - abs(value))
    least = np.flatnonzero(distance == distance.min())
    return int(next((bits for bits in least if bits % 2 == 0), least[0]))


def reference(x: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes without sign, and scales, one block after the other."""
    rows, columns = x.shape
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scales, found = np.zeros(shape), np.zeros(x.shape, np.uint8)
    for i, j in np.ndindex(*shape):
        place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        finite = np.abs(x[place][np.isfinite(x[place])])
        largest = finite.max() if finite.size else 0.0
        powers = [2.0**power for power in range(-127, 128)]
        scales[i, j] = 1.0 if largest == 0 else next((s for s in powers if largest / s <= 448), powers[-1])
        found[place] = np.vectorize(lambda value, s=scales[i, j]: nearest(value / s), otypes=[np.uint8])(x[place])
    return found, scales


def check(x: torch.Tensor, block: tuple[int, int]) -> None:
    q, scales = quantise(x, block)
    bits, due = reference(x.double().numpy(), block)
    np.testing.assert_array_equal(scales.double().numpy(), due)
    np.testing.assert_array_equal(q.view(torch.uint8).numpy() & 127, bits)
    stored = (q.view(torch.uint8).numpy() >> 7).astype(bool)
    told = (bits > 0) & np.isfinite(x.double().numpy())
    np.testing.assert_array_equal(stored[told], np.signbit(x.double().numpy())[told])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 11),
    block=st.sampled_from([(4, 4), (1, 4), (3, 5), (16, 16)]),
    exponent=st.integers(-140, 120),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_bytes_and_scales_are_those_of_the_search(
    seed: int, rows: int, columns: int, block: tuple[int, int], exponent: int, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    spread = generator.integers(-12, 3, (rows, columns))
    x = torch.from_numpy(generator.standard_normal((rows, columns)) * 2.0 ** (exponent + spread)).to(dtype)
    check(x, block)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0, 0.0],
        [-0.0, 1e-45, 0.0],
        [448.0, 449.0, -448.0],
        [float(np.nextafter(np.float32(448), np.float32(500))), 1.0, 2.0],
        [3.4e38, -3.4e38, 1.0],
        [2.0**-149, 2.0**-140, 0.0],
        [float("nan"), 1.0, -3.0],
        [float("inf"), 1.0, -3.0],
        [float("nan"), float("inf"), float("-inf")],
        [17.0, 18.0, 19.0],  # ties between 16, 18 and 20
        [2.0**-10, 3 * 2.0**-10, 448.0],  # ties between denormals
    ],
    ids=str,
)
def test_zero_tiny_huge_denormal_and_not_finite(values: list[float]) -> None:
    check(torch.tensor([values], dtype=torch.float32), (1, 4))
    check(torch.tensor([values], dtype=torch.float32).T.contiguous(), (4, 1))


@pytest.mark.parametrize(("shape", "block", "due"), [((300, 200), WEIGHTS, (3, 2)), ((5, 130), ACTIVATIONS, (5, 2))])
def test_ragged_shapes_have_scales_for_what_there_is(
    shape: tuple[int, int], block: tuple[int, int], due: tuple[int, int]
) -> None:
    x = torch.randn(shape)
    q, scales = quantise(x, block)
    assert (q.shape, scales.shape, scales.dtype) == (x.shape, due, torch.float32)
    stacked = torch.stack((x, 1000 * x))
    q2, scales2 = quantise(stacked, block)
    assert torch.equal(q2[0].view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(scales2[0], scales)
    assert torch.equal(block_scales(stacked[1], block), scales2[1])


@pytest.mark.parametrize("block", [WEIGHTS, ACTIVATIONS])
def test_the_round_trip_is_within_its_bound_and_stays_where_it_is(block: tuple[int, int]) -> None:
    """Half a unit in the last place: 1/16 of a number, or 2^-10 scales of a denormal; a second trip changes nothing."""
    x = torch.randn(256, 384, dtype=torch.float64).float()
    q, scales = quantise(x, block)
    back = dequantise(q, scales, block)
    own = torch.from_numpy(np.kron(scales.numpy(), np.ones(block, np.float32)))[:256, :384]
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, own * 2.0**-10)).all()
    again, same = quantise(back, block)
    np.testing.assert_array_equal(dequantise(again, same, block).numpy(), back.numpy())


def test_torch_reads_the_bytes_as_the_definition_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(every, [e4m3_of(bits) for bits in range(256)])
