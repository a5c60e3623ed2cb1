"""Which words of a command line are axes of a sweep, and the points that they make."""

import pytest

from moexpand.base.errors import InputError
from moexpand.conf.axes import Axis, combinations, point_name, split_axes


def test_values_in_every_notation() -> None:
    fixed, axes = split_axes(
        ["run.dir=/runs/a", "optim.lr=1e-5,3e-5", "seed=range(0,3)", "optim=cosine,wsd", "router.temperature=choice(0.5,1,2)"]
    )
    assert fixed == ["run.dir=/runs/a"]
    assert axes == [
        Axis("optim.lr", ("1e-05", "3e-05")),
        Axis("seed", ("0", "1", "2")),
        Axis("optim", ("cosine", "wsd")),
        Axis("router.temperature", ("0.5", "1", "2")),
    ]


def test_intervals() -> None:
    _, axes = split_axes(["optim.lr=tag(log,interval(1e-6,1e-4))", "balance.coefficient=interval(0,0.01)"])
    assert axes == [Axis("optim.lr", (), (1e-6, 1e-4), True), Axis("balance.coefficient", (), (0.0, 0.01))]


@pytest.mark.parametrize(
    "word", ["launch.options=[--mem=0,--qos=long]", "checkpoint=/models/a=b", "track.name='a,b'", "data.shards=s3://b/x (1)"]
)
def test_other_words_stay_as_they_are(word: str) -> None:
    assert split_axes([word]) == ([word], [])


def test_every_combination_once_the_last_axis_fastest() -> None:
    axes = [Axis("a", ("1", "2")), Axis("b", ("x", "y"))]
    assert list(combinations(axes)) == [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")]


def test_what_has_no_end_or_no_meaning_is_refused() -> None:
    with pytest.raises(InputError, match="is an interval, from which"):
        list(combinations([Axis("optim.lr", (), (0.0, 1.0))]))
    with pytest.raises(InputError, match="seed has several values twice"):
        split_axes(["seed=1,2", "seed=3,4"])
    with pytest.raises(InputError, match="a kind of sweep that there is not"):
        split_axes(["optim=glob(*)"])


def test_names_of_points_are_names_of_folders() -> None:
    assert point_name(("optim.lr=1e-05", "seed=1")) == "optim.lr_1e-05__seed_1"
    assert "/" not in point_name(("checkpoint=/models/a b",))
