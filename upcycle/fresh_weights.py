"""Fresh weights of a tensor by its name and shape, the same wherever they are drawn."""

import math

import numpy as np

from moexpand.base.random import generator
from moexpand.upcycle.safetensors_file import Shape

SELECTION_BIAS = ".e_score_correction_bias"
"""Ending of the names of selection biases."""


def fresh_tensor(name: str, shape: Shape, seed: int, width: float, fope_gain: float) -> np.ndarray:
    """float32: norms 1, biases 0, matrices normal; tables of FoPE the identity plus Xavier's normal distribution.

    Args:
        name: in a checkpoint; random numbers follow from it and the seed.
        width: standard deviation of matrices.
        fope_gain: gain of the tables' noise.
    """
    if name.endswith((SELECTION_BIAS, ".bias", ".in_proj_bias")):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    drawn = generator(seed, "fresh", name).standard_normal(shape, dtype=np.float32)
    if ".rotary_emb." not in name:
        return drawn * np.float32(width)
    # torch's fans of a tensor [heads, D, D] are D * D and heads * D, those of [D, D] both D
    fans = math.prod(shape[1:]) + shape[0] * math.prod(shape[2:])
    return np.eye(shape[-1], dtype=np.float32) + drawn * np.float32(fope_gain * math.sqrt(2 / fans))
