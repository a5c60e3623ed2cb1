"""Sweeps: each point is a run of its own in the sweep's folder, checked before any starts and passed over when it is done."""

from pathlib import Path

import pytest
import yaml

from tests.commands import moexpand, sentence
from tests.train.conftest import settings
from tests.train.faults import rows

SHORT = {"train__steps": 3, "launch__processes": 1, "parallel__expert": 1, "save__every": 0}


def sweep(shards: Path, folder: Path, *words: str, **changes: object) -> list[str]:
    return ["train", "--multirun", *settings(shards, folder, **{**SHORT, **changes})[1:], *words]


def test_every_combination_is_a_run_and_done_ones_are_passed_over(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rates"
    words = sweep(shards, folder, "seed=1,2", optim__lr="1e-2")
    done = moexpand(*words)
    assert done.returncode == 0, done.stderr
    names = {"seed_1", "seed_2"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["seed"]) == (0.01, int(name.removeprefix("seed_")))
        assert (config["track"]["group"], config["track"]["name"]) == ("rates", name)
        assert len(rows(folder / name)) == 3
    # The order of the ranking is that of the losses in the runs' own tables.
    lines = done.stdout.splitlines()
    ranked = [Path(line.split()[1]).name for line in lines[lines.index("---- loss") + 1 :][:2]]
    assert ranked == sorted(names, key=lambda name: rows(folder / name)[-1]["loss"])

    again = moexpand(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 2
    assert "step" not in again.stdout.replace("step_", "")


def test_a_point_that_cannot_work_stops_the_sweep_before_it_begins(shards: Path, tmp_path: Path) -> None:
    refused = moexpand(*sweep(shards, tmp_path / "sweep", train__global_batch="4,0"))
    assert "train.global_batch" in sentence(refused, 2)
    refused = moexpand(*sweep(shards, tmp_path / "sweep", parallel__expert="1,3"))
    assert "3" in sentence(refused, 2)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.layouts
def test_optuna_proposes_and_a_failing_point_is_one_that_failed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    words = sweep(shards, folder, "sweep=optuna", "sweep.metric=loss", "sweep.trials=2", optim__lr="tag(log,interval(1e-5,1e-2))")
    done = moexpand(*words)
    assert done.returncode == 0, done.stderr
    rates = [yaml.safe_load((folder / f"trial_{n:04}" / "config.yaml").read_text())["optim"]["lr"] for n in range(2)]
    assert len(set(rates)) == 2
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)

    # One more of each word: a layout that does not fit is a failure that the search hears of.
    mixed = moexpand(
        *sweep(
            shards,
            tmp_path / "mixed",
            "sweep=optuna",
            "sweep.metric=loss",
            "sweep.trials=3",
            train__steps=1,
            parallel__expert="1,3,5",
        )
    )
    assert mixed.returncode in (0, 1), mixed.stderr  # 1: all three were wrong
    told = [line for line in mixed.stdout.splitlines() if line.startswith("trial ")]
    assert len(told) == 3
    assert sum("failed with code 2" in line for line in told) > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--multirun", "run.dir=r", "data.shards=s"], "needs a key with several values"),
        (["train", "--multirun", "run.dir=a,b", "data.shards=s"], "run.dir must be the same at all points"),
        (["train", "run.dir=r", "data.shards=s", "seed=1,2"], "gives several values to seed; give one"),
        (["train", "run.dir=r", "data.shards=s", "sweep=optuna"], "sweep.sampler=optuna is for several runs; give --multirun"),
        (["count", "--multirun", "model=x"], "no other command has it"),
        (["train", "--multirun", "run.dir=r", "data.shards=s", "seed=1,2", "sweep=optuna"], "needs evaluations"),
        (
            [
                "train",
                "--multirun",
                "run.dir=r",
                "data.shards=s",
                "seed=1,2",
                "sweep=optuna",
                "sweep.metric=loss",
                "sweep.parallel=2",
            ],
            "needs launch=slurm",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(words: list[str], told: str) -> None:
    assert told in sentence(moexpand(*words), 2)
