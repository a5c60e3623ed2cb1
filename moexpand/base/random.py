"""Random numbers that depend on what they are for and on nothing else: the same for any number of ranks and any order."""

import hashlib

import numpy as np


def generator(seed: int, *subject: str | int) -> np.random.Generator:
    """A generator keyed by a seed and the names of what it is for, such as (seed, "fresh", "lm_head.weight").

    Philox is counter-based (Salmon et al., SC 2011): every key is a stream of its own.
    """
    key = hashlib.sha256("\0".join(map(str, (seed, *subject))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
