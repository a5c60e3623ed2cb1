"""FP8 in blocks: numbers of e4m3 with one scale, a power of two, for each block of a matrix, as released checkpoints have them.

Plain torch maths on any device, imported only where used. A number is stored as q with x ~ q * s: q in float8_e4m3fn, whose
largest value is 448, and s the smallest power of two with max|x| / s <= 448 over the block (ue8m0: exponents -127 ... 127).
Weights have blocks of 128 x 128, activations of 1 x 128. Blocks at the edges hold what there is.

Transformer Engine rounds 448 / max|x| to fp32 before it takes the power of two; the scale is the same unless max|x| lies within
one unit in the last place above 448 * 2^k, where it takes 2^k and the element saturates at 448.

Legend: R rows, C columns of a matrix, P x Q the block.
"""

import torch

LARGEST = 448.0
"""Of e4m3: 0.875 * 2^9."""

LEAST_EXPONENT, LARGEST_EXPONENT = -127, 127
"""Of a scale in ue8m0."""

WEIGHTS, ACTIVATIONS = (128, 128), (1, 128)
"""Blocks, as rows and columns."""


def block_scales(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The scale of each block of [..., R, C]: fp32 [..., ceil(R / P), ceil(C / Q)], powers of two.

    Numbers that are not finite do not count; a block without another number than 0 has the scale 1.
    """
    rows, columns = block
    magnitudes = torch.where(x.isfinite(), x, 0).abs().to(torch.promote_types(x.dtype, torch.float32))
    padded = torch.nn.functional.pad(magnitudes, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    largest = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
    # largest = m * 2^k with m in [0.5, 1), and 448 = 0.875 * 2^9.
    mantissa, exponent = torch.frexp(largest)
    power = exponent - 9 + (mantissa > 0.875)
    power = torch.where(largest > 0, power, 0).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), power).to(torch.float32)


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """The scale of every element of [..., R, C] from those of the blocks."""
    rows, columns = block
    return scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., : shape[-2], : shape[-1]]


def quantise(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix, or a stack of them, to FP8.

    Args:
        x: [..., R, C], any float dtype.
        block: `WEIGHTS`, `ACTIVATIONS` or another P, Q.

    Returns:
        float8_e4m3fn of the same shape, rounded to the nearest and to even, and the scales, see `block_scales`. NaN stays NaN,
        and so does an infinity become NaN, as e4m3 has none.
    """
    scales = block_scales(x, block)
    # Scales are powers of two: the quotient is exact where it is not far below e4m3's least number.
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) / spread(scales, x.shape, block)
    return _to_e4m3(torch.where(x.isinf(), torch.nan, scaled)), scales


def round_trip(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What is left of a matrix in FP8, in its own dtype, which holds these numbers exactly (bf16 and wider)."""
    return dequantise(*quantise(x, block), block, x.dtype)


def dequantise(
    q: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32, before: int = 0
) -> torch.Tensor:
    """q * s in another dtype; with scales that are powers of two exact in fp32, unless below its least normal number.

    Args:
        before: rows of the first block that come before those of `q`.
    """
    shape = torch.Size((*q.shape[:-2], q.shape[-2] + before, q.shape[-1]))
    return (q.to(torch.float32) * spread(scales.to(torch.float32), shape, block)[..., before:, :]).to(dtype)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Numbers of at most 448 to e4m3 in one rounding; for float64 torch's own way through fp32 could round twice."""
    if x.dtype == torch.float32:
        return x.to(torch.float8_e4m3fn)
    _, exponent = torch.frexp(x)
    # The unit in the last place: 2^-3 of the leading bit, and not below 2^-9, that of the denormals.
    unit = torch.ldexp(torch.ones_like(x), (exponent - 4).clamp(min=-9))
    return (torch.round(x / unit) * unit).to(torch.float32).to(torch.float8_e4m3fn)
