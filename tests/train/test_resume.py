"""The real command: runs that stop go on with the same trajectory, and what cannot go on is refused with a sentence."""

import json
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import moexpand, sentence, start
from tests.train.conftest import STEPS, STOP, settings


def _trajectory(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in ("step", "tokens", "loss", "grad_norm", "lr", "moe/load_cv")) for row in rows]


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """The straight run as it was after 10 steps, its metrics as a killed run leaves them."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:07d}")
    return run


def test_a_run_of_two_halves_is_the_straight_run(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Bitwise: every figure of every step, and the weights of the exported folders."""
    assert [row[0] for row in _trajectory(straight)] == list(range(1, STEPS + 1))
    assert _checkpoints(straight) == [f"step_{step:07d}" for step in (5, 10, 12)]
    run = tmp_path / "halves"
    for steps in (STOP, STEPS):
        done = moexpand(*settings(shards, run, train__steps=steps))
        assert done.returncode == 0, done.stderr
    assert _trajectory(run) == _trajectory(straight)
    targets = [tmp_path / "one", tmp_path / "other"]
    from moexpand.cli import main

    for each, target in zip((straight, run), targets, strict=True):
        assert main(["export", f"run={each}", f"target={target}"]) == 0
    files = sorted(path.name for path in targets[0].glob("*.safetensors"))
    assert files
    assert [(targets[0] / name).read_bytes() for name in files] == [(targets[1] / name).read_bytes() for name in files]


def test_one_rank_goes_on_from_two_and_finishes_near_the_straight_run(shards: Path, straight: Path, stopped: Path) -> None:
    done = moexpand(*settings(shards, stopped, launch__processes=1, parallel__expert=1))
    assert done.returncode == 0, done.stderr
    found, due = _trajectory(stopped), _trajectory(straight)
    assert found[:10] == due[:10]
    assert len(found) == STEPS
    for one, other in zip(found[10:], due[10:], strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-5)
        assert one[3] == pytest.approx(other[3], rel=1e-4)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped byte": _flip, "truncated file": _truncate, "missing file": Path.unlink}


def _choose(run: Path, resume: str) -> tuple[Path | None, list[str]]:
    """What a world of one rank would go on from."""
    from moexpand.parallel import ranks
    from moexpand.parallel.shape import Layout
    from moexpand.train import checkpoints

    here = ranks.start(Layout())
    try:
        return checkpoints.choose(run, resume, here)
    finally:
        ranks.stop()


def _weights_file(run: Path, step: int) -> Path:
    return max((run / "checkpoints" / f"step_{step:07d}").glob("*.distcp"), key=lambda path: path.stat().st_size)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(shards: Path, straight: Path, stopped: Path) -> None:
    file = _weights_file(stopped, 10)
    _flip(file)
    done = moexpand(*settings(shards, stopped))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "step_0000010" in warnings[0]
    assert file.name in warnings[0]
    assert _trajectory(stopped) == _trajectory(straight), "from step 5 to the end, as if nothing had happened"


@pytest.mark.parametrize("name", list(DAMAGES))
def test_every_kind_of_damage_is_seen_and_named(stopped: Path, name: str) -> None:
    from moexpand.base.errors import EnvironmentFailure
    from moexpand.train import checkpoints

    assert checkpoints.damage(stopped / "checkpoints" / "step_0000010") is None
    file = _weights_file(stopped, 10)
    DAMAGES[name](file)
    with pytest.raises(EnvironmentFailure, match=r"run\.resume=exact") as caught:
        _choose(stopped, "exact")
    assert str(file) in str(caught.value)
    chosen, warnings = _choose(stopped, "auto")
    assert chosen == stopped / "checkpoints" / "step_0000005"
    assert str(file) in " ".join(warnings)


@pytest.mark.parametrize("file", ["manifest.json", "trainer.json"])
def test_a_checkpoint_without_its_lists_is_no_checkpoint(stopped: Path, file: str) -> None:
    (stopped / "checkpoints" / "step_0000010" / file).unlink()
    chosen, warnings = _choose(stopped, "auto")
    assert chosen == stopped / "checkpoints" / "step_0000005"
    assert file in " ".join(warnings)


def test_exact_refuses_a_damaged_checkpoint(shards: Path, stopped: Path) -> None:
    file = _weights_file(stopped, 10)
    _truncate(file)
    before = _trajectory(stopped)
    said = sentence(moexpand(*settings(shards, stopped, run__resume="exact", launch__processes=1, parallel__expert=1)), 3)
    assert str(file) in said
    assert "run.resume=exact" in said
    assert _trajectory(stopped) == before


def test_when_all_checkpoints_are_damaged_the_run_does_not_start_anew(stopped: Path) -> None:
    from moexpand.base.errors import EnvironmentFailure

    for step in (5, 10):
        _flip(_weights_file(stopped, step))
    with pytest.raises(EnvironmentFailure, match="Every checkpoint"):
        _choose(stopped, "auto")


def test_never_refuses_a_run_that_has_begun(stopped: Path) -> None:
    from moexpand.base.errors import InputError

    with pytest.raises(InputError, match=r"step 10 and run\.resume=never"):
        _choose(stopped, "never")
    assert _checkpoints(stopped) == ["step_0000005", "step_0000010"]


def test_settings_that_shape_the_trajectory_may_not_change(shards: Path, stopped: Path) -> None:
    """Each is named with both values."""
    changes = {"seed": 7, "train.global_batch": 8, "model.moe_intermediate_size": 16}
    before = _trajectory(stopped)
    said = sentence(moexpand(*settings(shards, stopped, launch__processes=1, parallel__expert=1, **changes)), 2)
    for part in ("seed was 0 and is 7", "train.global_batch was 4 and is 8", "moe_intermediate_size was 8 and is 16"):
        assert part in said
    assert _trajectory(stopped) == before


def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_end(shards: Path, straight: Path, tmp_path: Path) -> None:
    run, long = tmp_path / "run", 400
    process = start(*settings(shards, run, train__steps=long, save__every=0))
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert len(err.strip().splitlines()) == 1, err
    assert "start again" in err
    (saved,) = _checkpoints(run)
    step = int(saved.removeprefix("step_"))
    assert 2 <= step < long
    assert [row[0] for row in _trajectory(run)] == list(range(1, step + 1))
    again = moexpand(*settings(shards, run, train__steps=step + 2, save__every=0))
    assert again.returncode == 0, again.stderr
    found, due = _trajectory(run), _trajectory(straight)
    assert [row[0] for row in found] == list(range(1, step + 3))
    shared = min(len(found), len(due))
    assert found[:shared] == due[:shared]


@pytest.mark.faults
def test_unreadable_samples_count_on_when_a_run_goes_on(shards: Path, tmp_path: Path) -> None:
    """They are kept with the checkpoint, by every rank, told once, and too many of them stop the run before a step is taken."""
    damaged = Path(shutil.copytree(shards, tmp_path / "shards"))
    spoilt = 0
    for path in sorted(damaged.glob("*.tar")):
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in [member for member in tar if member.name.endswith(".txt")][::4]:
                content[member.offset_data] ^= 1
                spoilt += 1
        path.write_bytes(content)
    run = tmp_path / "run"
    done = moexpand(*settings(damaged, run, train__steps=2, data__max_bad_fraction=0.5))
    assert done.returncode == 0, done.stderr
    progress = json.loads((run / "checkpoints" / "step_0000002" / "trainer.json").read_text())
    (bad,) = progress["bad"]
    assert 2 <= len(bad) <= spoilt
    assert list(bad) == sorted(bad)
    assert all("CRC32" in problem for problem in bad.values())
    total = json.loads((damaged / "dataset.json").read_text())["samples"]
    done = moexpand(*settings(damaged, run, train__steps=3, data__max_bad_fraction=(len(bad) - 1) / total))
    assert f"{len(bad)} of {total} samples are unreadable" in sentence(done, 2)
    assert _checkpoints(run) == ["step_0000002"]
    done = moexpand(*settings(damaged, run, train__steps=3, data__max_bad_fraction=0.5))
    assert done.returncode == 0, done.stderr
    assert f"{len(bad)} unreadable samples met before" in done.stdout
    assert not any(f"sample {key} is left out" in done.stdout for key in bad)
    assert bad.items() <= json.loads((run / "checkpoints" / "step_0000003" / "trainer.json").read_text())["bad"][0].items()
