"""An expansion that was stopped, at whatever moment, or shared by several processes, ends in the same bytes."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moexpand.base import claims
from moexpand.base.errors import DONE, STOPPED, WRONG_INPUT, EnvironmentFailure, InputError
from moexpand.upcycle import writer
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.writer import expand
from tests import commands
from tests.upcycle import families
from tests.upcycle.conftest import Run
from tests.upcycle.expanding import hashes, recipe_of, start, write_parent
from tests.upcycle.kills import kill_and_resume, partial_of, work_of

SHARD = "150KB"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parent(tmp_path_factory.mktemp("resume") / "parent")


@pytest.fixture(scope="module")
def whole(parent: Path) -> dict[str, str]:
    """SHA-256 of every file of a child that was written without interruption."""
    expand(recipe_of(parent), parent.with_name("whole"), max_shard_size=SHARD, workers=1)
    return hashes(parent.with_name("whole"))


class Interrupted(Exception):
    """What a test throws into the writer."""


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: Callable[[], BaseException]) -> None:
    """Fail when shard number `shards` + 1 would be finished."""
    real, count = writer.PartialFolder.finish, [0]

    def finish(self: writer.PartialFolder, *arguments: object) -> None:
        count[0] += 1
        if count[0] > shards:
            raise error()
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer.PartialFolder, "finish", finish)


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_files(parent: Path, whole: dict[str, str], tmp_path: Path, workers: int) -> None:
    summary = expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD, workers=workers)
    assert hashes(tmp_path / "child") == whole
    assert summary.shards == sum(name.endswith(".safetensors") for name in whole) > 10
    assert summary.bytes_read < summary.bytes_written
    assert summary.resumed == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child"]


def test_a_failure_keeps_finished_shards_and_resume_goes_on(
    parent: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "child"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, disk_full)
        with pytest.raises(EnvironmentFailure, match=r"disk is full .*; 3 of \d+ shards are finished in .*resume=true goes on"):
            expand(recipe_of(parent), target, max_shard_size=SHARD, workers=1)
    assert not target.exists()
    assert list((work_of(target) / "writing").iterdir()) == []
    with pytest.raises(InputError, match=r"unfinished expansion stands in .*resume=true"):
        expand(recipe_of(parent), target, max_shard_size=SHARD)
    found: list[int] = []
    summary = expand(recipe_of(parent), target, max_shard_size=SHARD, resume=True, found=found.append)
    assert summary.resumed == 3
    assert len(found) == 3
    assert hashes(target) == whole
    assert not partial_of(target).exists()


def test_a_failure_before_the_first_shard_leaves_nothing(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 0, disk_full)
    with pytest.raises(EnvironmentFailure, match="nothing was left behind"):
        expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_kind_cleans_up_and_is_raised_as_it_is(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0, lambda: Interrupted("as it is"))
    with pytest.raises(Interrupted, match=r"^as it is$"):
        expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 7}, "seed=0, not seed=7"),
        ({"router_noise": 0.5}, "router_noise=0.0, not router_noise=0.5"),
        ({"max_shard_size": "200KB"}, "max_shard_size=150000, not max_shard_size=200000"),
    ],
)
def test_changed_parameters_are_refused_by_name(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], says: str
) -> None:
    target = tmp_path / "child"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, disk_full)
        with pytest.raises(EnvironmentFailure):
            expand(recipe_of(parent), target, max_shard_size=SHARD)
    words: dict[str, object] = {"max_shard_size": change.pop("max_shard_size", SHARD)}
    with pytest.raises(InputError, match=says):
        expand(recipe_of(parent, **change), target, resume=True, **words)  # type: ignore[arg-type]


def test_a_finished_shard_that_was_damaged_since_is_written_again(
    parent: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "child"
    with monkeypatch.context() as patch:
        stop_after(patch, 4, disk_full)
        with pytest.raises(EnvironmentFailure):
            expand(recipe_of(parent), target, max_shard_size=SHARD, workers=1)
    first, second, third, _ = sorted((work_of(target) / "child").iterdir())
    first.unlink()
    os.truncate(second, 5000)
    with open(third, "r+b") as file:
        file.write(b"12345678")
    assert expand(recipe_of(parent), target, max_shard_size=SHARD, resume=True).resumed == 1
    assert hashes(target) == whole


def test_resuming_what_is_complete_changes_nothing(parent: Path, whole: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "child"
    expand(recipe_of(parent), target, max_shard_size=SHARD)
    assert expand(recipe_of(parent), target, max_shard_size=SHARD, resume=True).bytes_written == 0
    assert hashes(target) == whole
    with pytest.raises(InputError, match="exists already"):
        expand(recipe_of(parent, seed=1), target, max_shard_size=SHARD, resume=True)


def test_resume_goes_on_with_a_folder_whose_maker_died_at_once(parent: Path, whole: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".child.expanding").mkdir()
    (tmp_path / ".child.expanding" / "identity.0123abcd.partial").touch()
    expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD, resume=True)
    assert hashes(tmp_path / "child") == whole


def test_resume_removes_what_a_process_left_that_was_killed_after_publishing(parent: Path, tmp_path: Path) -> None:
    expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD)
    (tmp_path / ".child.expanding" / "work.0123abcd" / "manifests").mkdir(parents=True)
    expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child"]


def test_resume_without_anything_to_resume_begins(parent: Path, whole: dict[str, str], tmp_path: Path) -> None:
    expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD, resume=True)
    assert hashes(tmp_path / "child") == whole


def test_a_folder_of_something_else_is_not_resumed(parent: Path, tmp_path: Path) -> None:
    (tmp_path / ".child.expanding").mkdir()
    (tmp_path / ".child.expanding" / "precious.txt").touch()
    with pytest.raises(InputError, match="is not an unfinished expansion"):
        expand(recipe_of(parent), tmp_path / "child", resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order_and_resume_goes_on(
    parent: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    target = tmp_path / "child"
    process = start(parent, target, max_shard_size=SHARD, workers=1)
    while not target.exists() and not list(work_of(target).glob("manifests/*.json")):
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if process.returncode:  # otherwise the last shards were quicker than the signal
        assert process.returncode == STOPPED, said
        assert f"Stopped by {signal.Signals(number).name};" in said
        assert said.count("\n") == 1
        assert list((work_of(target) / "writing").iterdir()) == []
        expand(recipe_of(parent), target, max_shard_size=SHARD, resume=True)
    assert hashes(target) == whole


def test_processes_share_the_work(parent: Path, whole: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "child"
    processes = [start(parent, target, max_shard_size=SHARD, workers=1, resume=True) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert hashes(target) == whole
    written = [json.loads(out)["bytes_written"] for out, _ in said]
    alone = expand(recipe_of(parent), tmp_path / "alone", max_shard_size=SHARD).bytes_written
    assert sum(written) == alone  # no shard was written twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "child"]


def test_a_process_takes_over_the_shards_of_one_that_died(parent: Path, whole: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "child"
    first = start(parent, target, max_shard_size=SHARD, workers=1)
    while not list(partial_of(target).glob("work.*/writing/*")):
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = start(parent, target, max_shard_size=SHARD, workers=1, resume=True)
    while len(list(work_of(target).glob("manifests/*.json"))) < len(whole) // 2:
        time.sleep(0.01)
    assert second.poll() is None  # waits for the shard that the first one, alive, holds
    first.kill()
    began = time.monotonic()
    _, said = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode == 0, said
    assert time.monotonic() - began < claims.PATIENCE / 2  # a dead process on this host is known to be dead
    assert hashes(target) == whole


def test_a_second_process_without_resume_is_refused(parent: Path, tmp_path: Path) -> None:
    target = tmp_path / "child"
    first = start(parent, target, max_shard_size=SHARD, workers=1)
    while not partial_of(target).exists():
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = start(parent, target, max_shard_size=SHARD, workers=1)
    _, said = second.communicate(timeout=60)
    assert (second.returncode, said.count("\n")) == (WRONG_INPUT, 1), said
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 0


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_end_in_the_same_files(tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "parent", layers=8, hidden=512, intermediate=512, shard="20MB")
    shards = expand(recipe_of(parent), tmp_path / "whole", max_shard_size="5MB").shards
    due = hashes(tmp_path / "whole")

    def begin(target: Path, resume: bool) -> "subprocess.Popen[str]":
        return start(parent, target, max_shard_size="5MB", workers=2, resume=resume)

    moment, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        rounds += 1
        kills += kill_and_resume(begin, tmp_path / f"child{rounds}", shards, min(5, 20 - kills), moment)
        assert hashes(tmp_path / f"child{rounds}") == due
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "whole", *(f"child{number + 1}" for number in range(rounds))}


SIZES: dict[str, Any] = {"experts": 4, "top_k": 2, "layers": 4, "dense": (), "hidden": 256, "inner": 256}
CHILD = ("num_experts=16", "num_groups=2", "placement=random_balanced", "max_shard_size=2MB", "plain=true")
KINDS = {
    "drop": ("split", "init=drop", "keep_first=true"),
    "noise": ("split", "expert_noise=0.05", "router_noise=0.05"),
    "stacked": ("split", "experts_layout=fused"),
    "stacked, drop": ("split", "experts_layout=fused", "init=drop", "drop_shared=false", "keep_first=false"),
    "stacks taken apart": ("fused", "experts_layout=split"),
    "stacks taken apart, noise": ("fused", "experts_layout=split", "expert_noise=0.05"),
    "rows by a map": ("split", "vocab_map=map.json"),
    "rows by a tokenizer": ("split", "tokenizer=inserted", "vocab_size=500"),
}
"""The layout of the parent's experts, and keys of the command; files are beside the parent."""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> Path:
    """A folder with the parents `split` and `fused` (transposed, as on the hub), a tokenizer and a map of a vocabulary."""
    folder = tmp_path_factory.mktemp("kinds")
    families.make("qwen3_moe", folder / "split", vocab=420, **SIZES)
    families.make("qwen3_vl_moe", folder / "fused", fused=True, **SIZES)
    shutil.copyfile(tokenizer_folders["old"] / "tokenizer.json", folder / "split" / "tokenizer.json")
    shutil.copytree(tokenizer_folders["inserted"], folder / "inserted")
    (folder / "map.json").write_text(json.dumps([*range(419, 99, -1), *[[row, row + 1] for row in range(100)], *[None] * 30]))
    return folder


def words_of(kind: str, beside: Path) -> list[str]:
    """Words of the command, but for the target."""
    parent, *keys = KINDS[kind]
    found = [key.replace("=map", f"={beside}/map").replace("=inserted", f"={beside}/inserted") for key in keys]
    return ["upcycle", f"source={beside / parent}", *CHILD, *found]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_gives_the_same_files_of_every_kind(kind: str, beside: Path, run: Run, tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        assert run(*words_of(kind, beside), f"target={tmp_path / str(workers)}", f"workers={workers}")[0] == DONE
    one, *others = (hashes(tmp_path / str(workers)) for workers in (1, 2, 4))
    assert sum(name.endswith(".safetensors") for name in one) >= 10
    assert others == [one, one]


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_end_in_the_same_files_of_every_kind(kind: str, beside: Path, run: Run, tmp_path: Path) -> None:
    words, moment, kills = words_of(kind, beside), random.Random(kind), 0
    assert run(*words, f"target={tmp_path / 'whole'}")[0] == DONE
    due = hashes(tmp_path / "whole")
    shards = sum(name.endswith(".safetensors") for name in due)

    def begin(target: Path, resume: bool) -> "subprocess.Popen[str]":
        return commands.start(*words, f"target={target}", "workers=2", f"resume={str(resume).lower()}")

    for number in itertools.count():
        kills += kill_and_resume(begin, tmp_path / f"child{number}", shards, 5 - kills, moment)
        assert hashes(tmp_path / f"child{number}") == due
        if kills == 5:
            break
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _with_other_experts(parent: Path, folder: Path) -> Path:
    """A copy whose norms and config are the same and whose matrices are not, as after a merged adapter."""
    shutil.copytree(parent, folder)
    opened = open_checkpoint(folder)
    for name, info in opened.tensors.items():
        if ".experts." in name:
            with open(info.file, "r+b") as file:
                file.seek(info.start)
                file.write(bytes(byte ^ 1 for byte in opened.read_bytes(name)))
    return folder


def test_another_parent_with_the_same_norms_does_not_go_on(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3, disk_full)
        with pytest.raises(EnvironmentFailure):
            expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD)
    other = _with_other_experts(parent, tmp_path / "other")
    with pytest.raises(InputError, match="was begun with parent="):
        expand(recipe_of(other), tmp_path / "child", max_shard_size=SHARD, resume=True)


def test_a_parent_that_changes_while_it_is_read_gives_no_child(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(parent, tmp_path / "source"))
    file, original = next(source.glob("*.safetensors")), writer.PartialFolder.finish

    def finish(self: writer.PartialFolder, *arguments: object) -> None:
        os.utime(file)
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer.PartialFolder, "finish", finish)
    with pytest.raises(EnvironmentFailure, match=r"was changed while it was read.*nothing was left behind"):
        expand(recipe_of(source), tmp_path / "child", max_shard_size=SHARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_cannot_be_seen_is_not_removed(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "child"
    stop_after(monkeypatch, 3, disk_full)
    seen = writer.PartialFolder.finished

    def finished(self: writer.PartialFolder) -> list[str]:
        if len(list(self.manifests.iterdir())) >= 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return seen(self)

    monkeypatch.setattr(writer.PartialFolder, "finished", finished)
    with pytest.raises(EnvironmentFailure, match="resume=true goes on with it"):
        expand(recipe_of(parent), target, max_shard_size=SHARD, workers=1)
    assert len(list((work_of(target) / "manifests").iterdir())) >= 3


def test_a_link_is_no_target(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "child").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link or a mount point"):
        expand(recipe_of(parent), tmp_path / "child", max_shard_size=SHARD)
