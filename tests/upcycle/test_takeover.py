"""What a process of one host leaves, another host completes; and one that wakes up when that is done does no harm.

Hosts A and B are processes of this machine that hold each other for processes of another one (tests/upcycle/hosts.py).
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.upcycle.expanding import hashes, recipe_of, write_parent
from tests.upcycle.hosts import ENDED, SILENCE, STOPPED_THERE, Host, Moment, hosts

MIDDLE = ("pwrite writing/model-00002", 5)
"""Of the second shard: between two of its pieces."""

MOMENTS = {
    "before it makes the folder": ("os.mkdir ", 1),
    "before it looks what the folder holds": ("os.listdir ", 1),
    "while it makes the folder": ("os.mkdir writing", 1),
    "before it says what is expanded": ("os.rename ", 1),
    "before others may join": ("os.link ", 1),
    "before it looks for shards": ("os.listdir manifests", 1),
    "before it claims a shard": ("open claims/model-00002", 1),
    "when it has claimed a shard": ("open writing/model-00002", 1),
    "in the middle of a shard": MIDDLE,
    "before a shard is durable": ("fsync writing/model-00002", 1),
    "before a shard has its name": ("os.rename writing/model-00002", 1),
    "before a shard is recorded": ("os.rename manifests/.model-00002", 1),
    "before it gives up a claim": ("os.remove claims/model-00002", 1),
    "before it claims the end": ("open claims/finish", 1),
    "when it has claimed the end": ("os.mkdir writing/finish", 1),
    "before it copies side files": ("os.mkdir writing/finish", 2),
    "before it reads checksums": ("open manifests/model-00001", 1),
    "while it moves side files": ("os.mkdir child/a", 1),
    "before the child has its name": ("os.rename child", 1),
    "before the folder has gone": ("os.rmdir ", 1),
}
"""Where a process stops: before the event that is the n-th one to begin so."""


@dataclass(frozen=True)
class Expansion:
    """A small expansion, and what it has to end in.

    Attributes:
        words: of the command, but for the target.
        due: SHA-256 of every file.
        folder: for targets.
        start: starts a process of a host.
    """

    words: tuple[str, ...]
    due: dict[str, str]
    folder: Path
    start: Callable[..., Host]

    @property
    def target(self) -> Path:
        return self.folder / "child"

    def host(self, name: str, moment: Moment | None = None, number: signal.Signals = signal.SIGSTOP) -> Host:
        """Expand with `resume=true` on a host that stops, or gets another signal, at a moment."""
        return self.start(name, *self.words, f"target={self.target}", moment=moment, number=number)

    def check(self) -> None:
        """The child is there, whole, and nothing is beside it."""
        assert hashes(self.target) == self.due
        assert [path.name for path in self.folder.iterdir()] == ["child"]


def plan_in(file: Path, parent: Path, **settings: object) -> str:
    """Write a plan; returns the word that gives it."""
    file.write_text(json.dumps(recipe_of(parent, **settings).plan.to_json()))
    return f"plan={file}"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], dict[str, str]]:
    """Words of an expansion to six shards, and the hashes of a child that was written by one process without a pause."""
    folder = tmp_path_factory.mktemp("takeover")
    parent = write_parent(folder / "parent", layers=1)
    plan = plan_in(folder / "plan.json", parent, router_noise=0.05)
    words = ("upcycle", f"source={parent}", plan, "max_shard_size=150KB", "workers=1", "resume=true", "plain=true")
    with hosts() as start:
        code, _, said = start("alone", *words, f"target={folder / 'child'}").end()
    assert (code, said) == (0, "")
    due = hashes(folder / "child")
    assert sum(name.endswith(".safetensors") for name in due) == 6
    return words, due


@pytest.fixture
def expansion(small: tuple[tuple[str, ...], dict[str, str]], tmp_path: Path) -> Iterator[Expansion]:
    (tmp_path / "targets").mkdir()
    with hosts() as start:
        yield Expansion(*small, tmp_path / "targets", start)


def assert_ended_well(host: Host) -> str:
    """Exit code 0, and nothing on standard error; returns what the process printed."""
    code, out, said = host.end()
    assert (code, said) == (0, "")
    return out


def test_a_host_that_says_nothing_is_taken_over_and_does_no_harm_when_it_goes_on(expansion: Expansion) -> None:
    a = expansion.host("a", MIDDLE)
    assert a.settle() == STOPPED_THERE
    began = time.monotonic()
    out = assert_ended_well(expansion.host("b"))
    assert "6 shards (1 were finished before)" in out
    assert time.monotonic() - began > SILENCE  # it might have been slow
    expansion.check()
    a.go_on()
    assert_ended_well(a)
    expansion.check()


def test_a_host_that_was_killed_is_taken_over(expansion: Expansion) -> None:
    a = expansion.host("a", MIDDLE, number=signal.SIGKILL)
    assert a.end()[0] == -signal.SIGKILL
    out = assert_ended_well(expansion.host("b"))
    assert "6 shards (1 were finished before)" in out
    expansion.check()


def test_a_host_goes_on_with_what_was_taken_from_it_when_the_taker_is_killed(expansion: Expansion) -> None:
    a = expansion.host("a", MIDDLE)
    assert a.settle() == STOPPED_THERE
    b = expansion.host("b", MIDDLE, number=signal.SIGKILL)
    assert b.end()[0] == -signal.SIGKILL
    assert not expansion.target.exists()
    a.go_on()
    assert_ended_well(a)
    expansion.check()


@pytest.mark.parametrize("moment", ["before it looks what the folder holds", "before others may join"])
def test_a_host_that_stops_while_it_makes_the_folder_does_not_remove_the_work_of_one_that_joined(
    expansion: Expansion, moment: str
) -> None:
    a = expansion.host("a", MOMENTS[moment])
    assert a.settle() == STOPPED_THERE
    b = expansion.host("b", MIDDLE)
    assert b.settle() == STOPPED_THERE
    for host in (a, b):
        host.go_on()
    for host in (a, b):
        assert_ended_well(host)
    expansion.check()


BEFORE_IT_IS_PUBLISHED = [
    pytest.param(moment, id=name, marks=[] if moment == MIDDLE else pytest.mark.faults)
    for name, moment in MOMENTS.items()
    if name != "before the folder has gone"
]


@pytest.mark.parametrize("moment", BEFORE_IT_IS_PUBLISHED)
def test_a_host_that_goes_on_stays_out_of_an_expansion_that_was_begun_anew(
    expansion: Expansion, tmp_path: Path, moment: Moment
) -> None:
    """Of another seed, under the same name, with other bytes in every shard: the sleeper would put its own among them."""
    parent = Path(expansion.words[1].removeprefix("source="))
    plans = [plan_in(tmp_path / f"{seed}.json", parent, expert_noise=0.05, keep_first=False, seed=seed) for seed in (0, 1)]
    words = [word for word in expansion.words if not word.startswith("plan=")]
    a = expansion.start("a", *words, plans[0], f"target={expansion.target}", moment=moment)
    assert a.settle() == STOPPED_THERE
    shutil.rmtree(expansion.folder / ".child.expanding", ignore_errors=True)
    assert_ended_well(expansion.start("c", *words, plans[1], f"target={tmp_path / 'child'}"))
    b = expansion.start("b", *words, plans[1], f"target={expansion.target}", moment=("pwrite writing/model-00003", 5))
    assert b.settle() == STOPPED_THERE
    a.go_on()
    code, _, said = a.end()
    assert code in (2, 3), said
    assert said.count("\n") == 1
    assert not expansion.target.exists()
    b.go_on()
    assert_ended_well(b)
    assert hashes(expansion.target) == hashes(tmp_path / "child")
    assert [path.name for path in expansion.folder.iterdir()] == ["child"]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_at_whatever_moment_a_host_falls_silent_another_completes_the_child(
    expansion: Expansion, moment: Moment, number: signal.Signals
) -> None:
    a = expansion.host("a", moment, number=number)
    assert a.settle() == (STOPPED_THERE if number == signal.SIGSTOP else ENDED)
    assert_ended_well(expansion.host("b"))
    assert hashes(expansion.target) == expansion.due
    if number == signal.SIGSTOP:
        a.go_on()
        assert_ended_well(a)
    expansion.check()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_two_hosts_that_sleep_in_turn_end_in_the_same_files(expansion: Expansion) -> None:
    """Both go on, the one that slept first before the other: what either finds on waking is another's half-done work."""
    choice = random.Random(0)
    for _ in range(10):
        first, second = (choice.choice(sorted(MOMENTS.values())) for _ in range(2))
        a = expansion.host("a", first)
        assert a.settle() == STOPPED_THERE
        b = expansion.host("b", second)
        slept = b.settle() == STOPPED_THERE
        a.go_on()
        assert_ended_well(a)
        if slept:
            b.go_on()
        assert_ended_well(b)
        expansion.check()
        shutil.rmtree(expansion.target)
