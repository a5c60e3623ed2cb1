"""Random numbers depend on the seed and on what they are for, and on nothing else."""

import subprocess
import sys

import numpy as np

from moexpand.base.random import generator


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
