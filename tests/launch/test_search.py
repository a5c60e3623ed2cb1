"""Optuna's part of a sweep: it finds the bottom of a bowl, remembers, and goes on where it stood."""

from pathlib import Path

import pytest

from moexpand.base.errors import InputError
from moexpand.conf.axes import Axis
from moexpand.conf.launch_schema import Sweep
from moexpand.launch.search import Search

AXES = [Axis("x", (), (-4.0, 4.0)), Axis("n", (), (1.0, 9.0)), Axis("kind", ("a", "b"))]


def values(words: tuple[str, ...]) -> dict[str, str]:
    return dict(word.split("=") for word in words)


def bowl(words: tuple[str, ...]) -> float:
    given = values(words)
    return (float(given["x"]) - 1) ** 2 + abs(int(given["n"]) - 5) + (given["kind"] == "a")


def search(folder: Path, trials: int) -> Search:
    return Search(folder, Sweep(sampler="optuna", trials=trials), AXES, {"n"})


def test_it_finds_the_bottom(tmp_path: Path) -> None:
    study = search(tmp_path, 60)
    count = 0
    for trial in study.trials():
        given = values(trial.words)
        assert -4 <= float(given["x"]) <= 4
        assert given["kind"] in ("a", "b")
        study.tell(trial.number, bowl(trial.words))
        count += 1
    assert count == 60
    number, best = study.ranking()[0]
    assert best < 0.5
    assert 0 <= number < 60


def test_it_goes_on_with_what_was_begun_and_proposes_no_point_twice(tmp_path: Path) -> None:
    first = search(tmp_path, 6)
    proposed = first.trials()
    one, two, three = next(proposed), next(proposed), next(proposed)
    first.tell(one.number, 3.0)
    first.tell(two.number, None)

    again = search(tmp_path, 6)
    rest = []
    for trial in again.trials():
        rest.append(trial)
        again.tell(trial.number, 1.0 + trial.number)
    assert rest[0] == three
    assert [trial.number for trial in rest] == [2, 3, 4, 5]
    assert len({trial.words for trial in [one, two, *rest]}) == 6
    assert [number for number, _ in again.ranking()] == [0, 2, 3, 4, 5]
    assert list(search(tmp_path, 6).trials()) == []


def test_other_settings_are_refused_and_failures_are_remembered(tmp_path: Path) -> None:
    settings = Sweep(sampler="optuna", trials=3)
    study = Search(tmp_path, settings, AXES, {"n"}, ["train.steps=5"])
    assert not study.failed_before(0)
    again = Search(tmp_path, settings, AXES, {"n"}, ["train.steps=5"])
    assert again.failed_before(0)
    assert not again.failed_before(1)
    with pytest.raises(InputError, match=r"other settings \(train\.steps=5, train\.steps=6\)"):
        Search(tmp_path, settings, AXES, {"n"}, ["train.steps=6"])


def test_other_axes_are_refused(tmp_path: Path) -> None:
    next(search(tmp_path, 6).trials())
    with pytest.raises(InputError, match="was begun over x"):
        Search(tmp_path, Sweep(), [Axis("x", (), (0.0, 1.0))], set())
    with pytest.raises(InputError, match="begin above 0"):
        Search(tmp_path / "other", Sweep(), [Axis("x", (), (0.0, 1.0), True)], set())
