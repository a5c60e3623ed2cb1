"""Random numbers depend on the seed and on what they are for, and on nothing else."""

import hashlib
import subprocess
import sys
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from moexpand.base.random import LEVELS, generator, normals, raw_integers

RAW = "a4de8997c0b2a27be7d5c9d33f225c9dafb7b64f360dacc9cd64f10c8dfe7e95"
NORMALS = "de9fe777c4646f9a72b04784a359521798b4f67b77862970dad9488119625c9e"


def test_the_same_subject_gives_the_same_numbers_in_another_process() -> None:
    code = "from moexpand.base.random import generator; print(generator(7, 'fresh', 3).integers(0, 10**9, 4).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(generator(7, "fresh", 3).integers(0, 10**9, 4).tolist())


def test_every_seed_and_subject_has_a_stream_of_its_own() -> None:
    subjects = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, 1, "a"), (0, "")]
    draws = np.stack([generator(seed, *subject).standard_normal(1000) for seed, *subject in subjects])
    correlations = np.corrcoef(draws) - np.eye(len(subjects))
    assert np.abs(correlations).max() < 0.15


def test_drawing_elsewhere_changes_nothing() -> None:
    first = generator(0, "x")
    expected = generator(0, "x").standard_normal(8)
    generator(0, "y").standard_normal(100)
    np.random.default_rng(0).standard_normal(3)
    assert np.array_equal(first.standard_normal(8), expected)


def test_normals_are_normal() -> None:
    """Moments and tails against the distribution's own; 2,000,000 draws."""
    draws = normals(generator(0, "normals"), 1000, 2000).astype(np.float64).ravel()
    assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
    assert abs(draws.std() - 1) < 5 / np.sqrt(2 * draws.size)
    for level in (-3, -1, -0.1, 0.5, 2, 3.5):
        expected = NormalDist().cdf(level)
        assert abs((draws < level).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / draws.size) + 1 / LEVELS
    neighbours = np.corrcoef([np.roll(draws, distance) for distance in range(6)])
    assert np.abs(neighbours - np.eye(6)).max() < 5 / np.sqrt(draws.size)


def test_no_quantile_lies_where_the_last_bits_of_a_logarithm_decide_its_rounding() -> None:
    """Computed to 1e-15, whatever `log` and fused multiply-adds do; 1,000 times as far from where fp32 would round otherwise."""
    exact = np.array([NormalDist().inv_cdf((level + 0.5) / LEVELS) for level in range(LEVELS)])
    rounded = exact.astype(np.float32)
    for side in (np.float32(-np.inf), np.float32(np.inf)):
        turning = (rounded.astype(np.float64) + np.nextafter(rounded, side)) / 2
        assert (np.abs(exact - turning) / np.abs(exact)).min() > 1e-12
    levels = np.arange(LEVELS, dtype="<u2").view("<u8")
    stream = cast(Any, SimpleNamespace(bit_generator=SimpleNamespace(random_raw=lambda count: levels[:count])))
    assert np.array_equal(normals(stream, 1, LEVELS)[0], rounded)


def test_normals_may_be_drawn_in_portions_of_rows() -> None:
    whole = normals(generator(1, "x"), 7, 5)
    stream = generator(1, "x")
    assert np.array_equal(np.concatenate([normals(stream, 3, 5), normals(stream, 0, 5), normals(stream, 4, 5)]), whole)
    assert whole.shape == (7, 5)
    assert whole.dtype == np.float32


def test_the_streams_are_what_they_always_were() -> None:
    """Checkpoints name a seed instead of bytes: a numpy or a processor with other numbers must not pass unnoticed."""
    raw, drawn = raw_integers(generator(5, "golden"), 1000), normals(generator(5, "golden"), 100, 4001)
    assert hashlib.sha256(raw.astype("<u8").tobytes()).hexdigest() == RAW
    assert hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest() == NORMALS
