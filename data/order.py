"""Order by counter-based random numbers: a number is a pure function of its place and a key, so nothing has a state to save."""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of 64-bit numbers. uint64 [...] -> uint64 [...]."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_numbers(count: int, *key: int | str) -> np.ndarray:
    """uint64 [count]: the number at place i depends on i and the key alone, on every machine and library version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    start = np.uint64(int.from_bytes(digest, "little"))
    return mix64(mix64(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN) + start)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """int64 [count]: the numbers 0 ... count - 1 in an order that the key decides."""
    return np.argsort(random_numbers(count, *key), kind="stable")


class Shuffle:
    """A random order of the numbers 0 ... count - 1 of which any part can be had without the rest.

    A Feistel network over the smallest power of two that holds `count`; a place that it sends beyond `count` is sent on until it
    falls inside ("cycle walking", Black and Rogaway 2002), on average less than once. The key decides the order.
    """

    ROUNDS = 6

    def __init__(self, count: int, *key: int | str) -> None:
        self.count = count
        bits = max((count - 1).bit_length(), 2)
        self._low, self._high = bits // 2, bits - bits // 2
        self._keys = random_numbers(self.ROUNDS, *key)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 [N] of places below `count` -> int64 [N], the number at each."""
        numbers = self._network(places.astype(np.uint64))
        while len(outside := np.flatnonzero(numbers >= self.count)):
            numbers[outside] = self._network(numbers[outside])
        return numbers.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._high, self._low
        left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            # An even number of rounds brings halves of unequal width back to where they were.
            left, right = right, left ^ (mix64(right + key) >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def hash_of_key(key: str) -> int:
    """64-bit hash of a sample's key, the same wherever and whenever it is computed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
