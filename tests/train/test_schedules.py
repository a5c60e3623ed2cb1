"""Learning rates, by hand."""

import pytest

from moexpand.conf.train_schema import Optim
from moexpand.train.schedules import learning_rate


def _rates(steps: int, **settings: object) -> list[float]:
    return [learning_rate(Optim(**settings), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def test_wsd_warms_up_stays_and_falls() -> None:
    rates = _rates(10, lr=1.0, schedule="wsd", warmup_steps=4, decay_steps=3)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_wsd_falls_towards_the_smallest_rate() -> None:
    rates = _rates(5, lr=1.0, min_lr=0.2, schedule="wsd", decay_steps=3)
    assert rates == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_a_cosine_after_the_warm_up() -> None:
    rates = _rates(6, lr=1.0, min_lr=0.5, schedule="cosine", warmup_steps=2)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75 + 0.25 * 2**-0.5, 0.75, 0.75 - 0.25 * 2**-0.5])


def test_constant_stays() -> None:
    assert _rates(3, lr=0.3, schedule="constant", warmup_steps=1) == [0.3] * 3


def test_a_longer_run_without_decay_starts_the_same() -> None:
    """So a run that is prolonged goes on as if it had been meant to be that long."""
    assert _rates(4, lr=1.0, schedule="wsd", warmup_steps=2) == _rates(9, lr=1.0, schedule="wsd", warmup_steps=2)[:4]
