"""Random numbers that depend on what they are for and on nothing else: the same for any number of ranks and any order."""

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np

LEVELS = 1 << 16


def generator(seed: int, *subject: str | int) -> np.random.Generator:
    """A generator keyed by a seed and the names of what it is for, such as (seed, "fresh", "lm_head.weight").

    Philox is counter-based (Salmon et al., SC 2011): every key is a stream of its own.
    """
    key = hashlib.sha256("\0".join(map(str, (seed, *subject))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def raw_integers(stream: np.random.Generator, count: int) -> np.ndarray:
    """The next `count` integers of the bit generator, uint64.

    numpy promises this stream for good (NEP 19); it promises neither the numbers nor the order of `choice`, `permutation` or
    `standard_normal` from one version to the next.
    """
    return np.asarray(stream.bit_generator.random_raw(count), dtype=np.uint64)


def normals(stream: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Standard normal draws, float32 [rows, width]: each is one of 65,536 equally likely values between -4.33 and 4.33.

    The values are the normal's quantiles at (i + 1/2) / 65536, looked up by 16 raw bits. Hence the numbers are the same with
    every numpy and on every processor, whose `exp`, `log` and fused multiply-add decide what `standard_normal` returns, and
    they take a sixth of its time. (The table itself is computed with `log` to 1e-15 and rounded to float32; none of its values
    lies within 1e-12 of where the rounding turns.) Every row begins with a fresh integer of the stream: rows may be drawn in
    portions.
    """
    per_row = -(-width // 4)
    levels = raw_integers(stream, rows * per_row).astype("<u8", copy=False).view("<u2").reshape(rows, 4 * per_row)
    return _quantiles().take(levels, mode="clip")[:, :width]


@cache
def _quantiles() -> np.ndarray:
    normal = NormalDist()
    values = np.array([normal.inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS)], dtype=np.float32)
    values.flags.writeable = False
    return values
