"""Which steps are not taken, by figures alone; test_faults.py shows the same in whole runs."""

import math
import random
import statistics
from dataclasses import asdict

import pytest

from moexpand.base.errors import CheckFailed
from moexpand.conf.train_schema import Guard as Settings
from moexpand.train.guard import Guard, History


def _seen(settings: Settings, steps: int = 64, seed: int = 0) -> Guard:
    """A guard after steps with losses around 3 +- 0.05 and norms around 1."""
    rng, guard = random.Random(seed), Guard(settings, History())
    for step in range(1, steps + 1):
        loss, norm = 3 + rng.gauss(0, 0.05), math.exp(rng.gauss(0, 0.1))
        assert guard.refused(loss, norm) == "", "ordinary noise is never a leap"
        guard.note(step, loss, norm, "")
    return guard


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_noise_is_taken_and_a_tenfold_loss_is_not(seed: int) -> None:
    guard = _seen(Settings(), 400, seed)
    assert "the loss leapt to 30.0" in guard.refused(30.0, 1.0)
    assert "the gradient norm leapt to 1000" in guard.refused(3.0, 1000.0)
    assert guard.refused(0.3, 1e-3) == "", "falling is no leap"


def test_the_bound_is_that_of_the_formula() -> None:
    guard = _seen(Settings(deviations=6.0))
    losses = guard.history.losses
    centre = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - centre) for loss in losses)
    assert deviation > 0.005 * centre, "the least deviation does not count here"
    assert guard.refused(centre + 5.999 * deviation, 1.0) == ""
    assert guard.refused(centre + 6.001 * deviation, 1.0) != ""


def test_one_leap_in_the_window_does_not_hide_the_next() -> None:
    """Mean and standard deviation would: they grow with the leap."""
    guard = _seen(Settings(spikes="warn"))
    assert guard.refused(30.0, 1.0) == ""
    assert "leapt to 30.0" in guard.warning
    guard.note(65, 30.0, 1.0, "")
    assert guard.refused(30.0, 1.0) == ""
    assert "leapt to 30.0" in guard.warning
    assert guard.refused(3.0, 1.0) == ""
    assert guard.warning == ""


def test_too_few_steps_or_off_judge_nothing() -> None:
    assert Guard(Settings(), History()).refused(1e9, 1e9) == ""
    guard = _seen(Settings(begin=32), 31)
    assert guard.refused(30.0, 1.0) == ""
    assert _seen(Settings(spikes="off")).refused(30.0, 1.0) == ""


def test_skipped_steps_leave_the_figures_and_too_many_in_a_row_stop_the_run() -> None:
    guard = _seen(Settings(stop_after=3))
    before = list(guard.history.losses)
    for step, taken in ((65, False), (66, False), (67, True), (68, False), (69, False)):
        guard.note(step, 3.0 if taken else math.nan, 1.0, "" if taken else "the loss is nan")
    assert guard.history.losses == [*before, 3.0]
    with pytest.raises(CheckFailed, match="3 steps in a row were skipped, the last, step 70, because the loss is nan"):
        guard.note(70, math.nan, 1.0, "the loss is nan")


def test_what_a_guard_remembers_travels_with_the_checkpoint() -> None:
    guard = _seen(Settings())
    guard.note(65, math.nan, 1.0, "the loss is nan")
    again = Guard(Settings(), History(**asdict(guard.history)))
    for loss in (3.1, 3.3, 3.5, 4.0, 30.0):
        assert again.refused(loss, 1.0) == guard.refused(loss, 1.0)
    assert again.history.skipped == 1
    assert len(_seen(Settings(), 300).history.losses) == Settings().window
