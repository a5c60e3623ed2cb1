"""Broken and hostile files end under a reason, in bounded time and memory, and take nothing else along."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from moexpand.base.errors import EnvironmentFailure
from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.sandbox import run_jobs
from moexpand.data.units import ReadOptions
from tests.data.pdf_maker import paragraph, text, write_pdf

BODY = ["This is a page of a document that nothing is wrong with, and it has enough text to be kept by the filters."] * 4


def hang(seconds: float) -> None:
    time.sleep(seconds)


def devour() -> None:
    held = []
    while True:
        held.append(bytearray(64 << 20))


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def write(path: str) -> None:
    Path(path).write_text("done")


def find_the_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail() -> None:
    raise ValueError("a flaw in the parser")


def test_jobs_that_hang_devour_memory_or_die_are_reported_and_others_finish(tmp_path):
    out = tmp_path / "out"
    assert dict(run_jobs(write, [(str(out),)], 2, 60.0)) == {0: None}
    assert out.read_text() == "done"
    started = time.monotonic()
    assert dict(run_jobs(hang, [(600.0,), (0.0,)], 2, 12.0)) == {0: "time_limit", 1: None}
    assert time.monotonic() - started < 60
    assert dict(run_jobs(devour, [()], 1, 30.0)) == {0: "memory_limit"}
    assert dict(run_jobs(die, [()], 1, 30.0)) == {0: "crashed"}
    assert dict(run_jobs(fail, [()], 1, 30.0)) == {0: "crashed"}


def test_a_full_disk_is_not_blamed_on_the_document():
    with pytest.raises(EnvironmentFailure, match="disk is full"):
        list(run_jobs(find_the_disk_full, [()], 1, 30.0))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_pdf(folder / "good.pdf", [paragraph(72, 700, BODY)])
    write_pdf(folder / "encrypted.pdf", [paragraph(72, 700, BODY)], encrypt=True)
    write_pdf(folder / "giant_page.pdf", [paragraph(72, 700, BODY)], media=(200000, 200000))
    write_pdf(folder / "empty_page.pdf", [""])
    write_pdf(folder / "path_bomb.pdf", ["0 0 m 9 9 l S\n" * 1_000_000 + text(72, 700, "bomb")] * 80)
    whole = write_pdf(folder / "truncated.pdf", [paragraph(72, 700, BODY)]).read_bytes()
    (folder / "truncated.pdf").write_bytes(whole[:300])
    (folder / "garbage.pdf").write_bytes(bytes(range(256)) * 40)
    (folder / "nothing.pdf").write_bytes(b"")
    return folder


def test_every_hostile_file_has_a_reason_and_the_good_one_is_kept(hostile, tmp_path):
    started = time.monotonic()
    options = BuildOptions(ReadOptions(tokenizer="qwen-8192"), workers=2, pdf_seconds=8.0)
    lines: list[str] = []
    summary = build_dataset(str(hostile), [], tmp_path / "out", options, lines.append)
    assert time.monotonic() - started < 60
    reasons = {line.split("/")[-1].split(".pdf")[0]: line.split(": ")[1] for line in lines if ".pdf" in line}
    assert reasons == {
        "good": "1 pages, 0 of 0 figures and tables",
        "encrypted": "encrypted",
        "giant_page": "page_size",
        "empty_page": "no_text",
        "truncated": "broken",
        "garbage": "broken",
        "nothing": "broken",
        "path_bomb": "time_limit",
    }
    documents = summary["stages"]["documents"]
    assert documents["input"] == 8 == documents["kept"] + sum(documents["dropped"].values())
    assert documents["dropped"] == {"broken": 3, "encrypted": 1, "no_text": 1, "page_size": 1, "time_limit": 1}
    assert summary["samples"] == 1
