"""What a run trains on: several sources at once, tars that others wrote, processes that read ahead, and kills at any moment."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import webdataset

from tests.commands import moexpand, start
from tests.train.conftest import STEPS, STOP, settings

COLUMNS = ("step", "tokens", "loss", "grad_norm")


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trajectory(run: Path) -> list[tuple]:
    return [tuple(row[name] for name in COLUMNS) for row in rows(run)]


@pytest.fixture(scope="module")
def mixture(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of the shards and of tars written by hand with webdataset."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "tars").mkdir()
    with webdataset.TarWriter(str(folder / "tars" / "mine.tar")) as sink:
        for number in range(60):
            sink.write(
                {"__key__": f"{number:03d}", "json": {"content": f"Number {number} and {number + 1} are neighbours. " * 4}}
            )
    done = moexpand("data", "index", f"shards={folder / 'tars'}", "tokenizer=qwen-8192", "text_key=content", "workers=1")
    assert done.returncode == 0, done.stderr
    assert "60 samples" in done.stdout
    file = folder / "mixture.yaml"
    file.write_text(f"- {{shards: {shards}, weight: 3}}\n- {{shards: tars, weight: 1, max_epochs: 50}}\n", encoding="utf-8")
    return file


@pytest.mark.layouts
def test_a_mixture_trains_the_same_whether_it_is_read_ahead_or_not(mixture: Path, tmp_path: Path) -> None:
    runs = {}
    for workers in (0, 2):
        runs[workers] = tmp_path / f"run-{workers}"
        done = moexpand(
            *settings(mixture, runs[workers], train__steps=4, data__workers=workers, launch__processes=1, parallel__expert=1)
        )
        assert done.returncode == 0, done.stderr
    assert trajectory(runs[0]) == trajectory(runs[2])
    last = rows(runs[0])[-1]
    assert last["tokens/shards"] > 0
    assert sum(row["tokens/tars"] for row in rows(runs[0])) > 0
    assert last["epoch/tars"] > last["epoch/shards"] > 0


@pytest.mark.faults
def test_a_killed_run_goes_on_with_the_batches_of_the_undisturbed_one(shards: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*settings(shards, run, data__workers=1))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) > STOP:
            break
        time.sleep(0.05)
    family = psutil.Process(process.pid)
    for member in [family, *family.children(recursive=True)]:
        member.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    done = moexpand(*settings(shards, run, data__workers=1))
    assert done.returncode == 0, done.stderr
    assert len(trajectory(run)) == STEPS
    assert trajectory(run) == trajectory(straight)


def test_files_that_are_no_mixture_are_refused(tmp_path: Path, shards: Path) -> None:
    file = tmp_path / "mixture.yaml"
    for text, message in (
        ("shards: x\n", "must hold a list of {shards: FOLDER, weight: NUMBER, max_epochs: NUMBER}"),
        ("- {shard: x}\n", "Entry 0 of"),
        (f"- {{shards: {shards}, weight: -1}}\n", "with numbers above 0"),
        (f"- {{shards: {shards}, weight: 1, max_epochs: 0.001}}\n", "and it may be read 0.001 times"),
        ("- [\n", "cannot be read as YAML"),
    ):
        file.write_text(text, encoding="utf-8")
        done = moexpand(*settings(file, tmp_path / "run"))
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
