"""The parent's held-out loss beside the child's: measured once, kept, and the same as the parent's own evaluation."""

import json
from pathlib import Path

import pytest

from moexpand.base.errors import InputError
from tests.train.conftest import from_checkpoint, settings
from tests.train.workers import train_here


def _evaluations(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def _words(shards: Path, run: Path, checkpoint: Path, **changes: object) -> list[str]:
    one = {"launch__processes": 1, "parallel__expert": 1, "evaluate__every": 1, "save__every": 1}
    return settings(shards, run, **{**from_checkpoint(checkpoint), **one, **changes})


@pytest.mark.layouts
def test_the_parents_loss_is_that_of_its_own_evaluation(
    shards: Path, exported: Path, child: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(_words(shards, tmp_path / "parent", exported, train__steps=1))
    due = _evaluations(tmp_path / "parent")[0]
    assert "parent_loss" not in due
    run = tmp_path / "child"
    train_here(_words(shards, run, child, train__steps=1, evaluate__parent=exported))
    found = _evaluations(run)
    assert [row["parent_loss"] for row in found] == [due["held_out_loss"]] * 2
    assert found[0]["held_out_loss"] != due["held_out_loss"]
    told = f"parent's {due['held_out_loss']:.4f} ({found[0]['held_out_loss'] - due['held_out_loss']:+.4f})"
    assert told in capsys.readouterr().out
    # Kept: another start takes it as it is, and measures anew where something else is asked for.
    kept = json.loads((run / "parent.json").read_text())
    (run / "parent.json").write_text(json.dumps({**kept, "held_out_loss": 1.25}))
    train_here(_words(shards, run, child, train__steps=2, evaluate__parent=exported))
    assert _evaluations(run)[-1]["parent_loss"] == 1.25
    train_here(_words(shards, run, child, train__steps=3, evaluate__parent=exported, evaluate__batches=4))
    assert _evaluations(run)[-1]["parent_loss"] not in (1.25, due["held_out_loss"])


def test_a_parent_that_cannot_be_evaluated_is_refused(shards: Path, exported: Path, child: Path, tmp_path: Path) -> None:
    for changes, told in (
        ({"evaluate__every": 0, "evaluate__parent": exported}, "evaluate.every=0 makes none"),
        ({"evaluate__parent": tmp_path / "none"}, "is not a folder"),
    ):
        with pytest.raises(InputError, match=told):
            train_here(_words(shards, tmp_path / "run", child, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
