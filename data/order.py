"""Order by counter-based random numbers: a number is a pure function of its place and a key, so nothing has a state to save."""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of 64-bit numbers. uint64 [...] -> uint64 [...]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_numbers(count: int, *key: int | str) -> np.ndarray:
    """uint64 [count]: the number at place i depends on i and the key alone, on every machine and library version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    return _mix(_mix(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN) + start)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """int64 [count]: the numbers 0 ... count - 1 in an order that the key decides."""
    return np.argsort(random_numbers(count, *key), kind="stable")


def hash_of_key(key: str) -> int:
    """64-bit hash of a sample's key, the same wherever and whenever it is computed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
