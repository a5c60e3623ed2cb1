"""Numbers that go wrong on one rank: the step is skipped on all, counted and told, and what is wrong is never saved."""

from pathlib import Path

import pytest

from moexpand.launch.local import run_workers
from tests.train.conftest import STEPS
from tests.train.faults import checkpoints, rows, short

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]


def _run(shards: Path, run: Path, how: str, steps: str, **changes: object) -> int:
    words = short(shards, run, guard__begin=8, **changes)
    arguments = [how, steps, *words[1:]]
    return run_workers("tests.train.poisoned_worker", arguments, 2, run / "launch.log", run, 5.0, timeout=120, echo=False)


@pytest.mark.parametrize(
    ("how", "step", "reason"),
    [
        ("gradient", 4, "the gradient norm is nan"),
        ("loss", 4, "the loss is inf"),
        ("leap", 11, "the loss leapt to "),
    ],
)
def test_a_bad_step_is_skipped_on_all_ranks_and_the_run_goes_on(
    shards: Path, straight: Path, tmp_path: Path, how: str, step: int, reason: str
) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, how, str(step)) == 0
    found, due = rows(run), rows(straight)
    assert [row["step"] for row in found if row["skipped"]] == [step]
    assert [row["loss"] for row in found[: step - 1]] == [row["loss"] for row in due[: step - 1]]
    assert found[step]["loss"] != due[step]["loss"], "the weights stayed as they were before the step"
    assert all(row["loss"] is not None and row["loss"] < 10 for row in found[step:])
    (event,) = [row for row in rows(run, "events.jsonl") if row["event"] == "skipped"]
    assert event["step"] == step
    assert f"step {step} is skipped: {reason}" in event["text"]
    assert checkpoints(run)[-1] == f"step_{STEPS:07d}"


def test_a_leap_that_is_only_warned_of_is_taken(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, "leap", "11", guard__spikes="warn") == 0
    assert not any(row["skipped"] for row in rows(run))
    assert [(row["event"], row["step"]) for row in rows(run, "events.jsonl") if row["event"] == "leapt"] == [("leapt", 11)]


def test_too_many_bad_steps_in_a_row_stop_the_run_unsaved(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, "gradient", "6,7,8,9,10", guard__stop_after=5) == 1
    assert "5 steps in a row were skipped, the last, step 10, because the gradient norm is nan" in capfd.readouterr().err
    assert checkpoints(run) == ["step_0000005"]
    assert [row["skipped"] for row in rows(run)] == [0] * 5 + [1] * 5


def test_a_weight_that_is_not_finite_is_never_saved(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert _run(shards, run, "weight", "7") == 1
    said = capfd.readouterr().err
    assert "A weight is not finite after step 10, so no checkpoint is saved" in said
    assert checkpoints(run) == ["step_0000005"]
