"""A build that is killed at any moment goes on, pays for nothing twice, and ends with the bytes of an undisturbed one."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from moexpand.base.errors import InputError
from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.chat import ChatSettings
from moexpand.data.inspect import inspect_shards
from moexpand.data.sheet import write_sheet
from moexpand.data.units import ReadOptions
from moexpand.data.workplace import Workplace
from tests.data.conftest import WORDS, write_jsonl
from tests.data.pdf_maker import paragraph, plot, text, write_pdf

KILLS = 10
ASCII_WORDS = [word for word in WORDS if word.isascii()]
TEMPLATES = {
    "domains": {"chemistry": {"system": "You answer from measured data."}},
    "templates": {
        "solubility": {"domain": "chemistry", "text": ["{name} dissolves at {value} g/L.", "Solubility of {name}: {value}."]}
    },
}


def prose(number: int, count: int) -> str:
    rng = random.Random(number)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_sources(folder: Path) -> Path:
    """A little of everything that a build reads."""
    folder.mkdir()
    for number in range(6):
        rng = random.Random(number)
        lines = [" ".join(rng.choice(ASCII_WORDS) for _ in range(11)) for _ in range(9)]
        body = text(72, 800, f"Document {number}") + paragraph(72, 760, lines) + plot(150, 460, 300, 150)
        body += "".join(f"{rng.randint(160, 400)} {rng.randint(465, 580)} {rng.randint(10, 60)} 25 re f\n" for _ in range(6))
        caption = text(200, 440, f"Figure 1: Boxes number {number} in a frame.")
        write_pdf(folder / f"paper-{number}.pdf", [body + caption + paragraph(72, 400, lines[::-1])])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    write_jsonl(folder / "documents.jsonl", 40)
    (folder / "notes.md").write_text("\n\n".join(prose(900 + i, 40) for i in range(12)), encoding="utf-8")
    chats = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": prose(50 + i, 12)}]}
        for i in range(8)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    rows = "name,value\n" + "".join(f"compound {i},{i / 7:.3f}\n" for i in range(9)) + "nothing,\n"
    (folder / "records.csv").write_text(rows, encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": [prose(200 + i, 60) for i in range(10)] + [None]}), folder / "rows.parquet")
    (folder / "photos").mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 192)).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(f"Coloured squares, picture {number}.", encoding="utf-8")
    (folder / "photos" / "5.png").write_bytes((folder / "photos" / "0.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("everything") / "sources")


def options(**changes: object) -> BuildOptions:
    read = ReadOptions(tokenizer="qwen-8192", templates=TEMPLATES, chat=ChatSettings(enable_thinking=False))
    return BuildOptions(read, **({"workers": 1, "shard_samples": 16} | changes))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, build_dataset(None, [str(sources)], out, options(), lambda line: None)


def test_every_kind_of_source_gives_its_samples_and_nothing_is_lost(undisturbed, sources):
    out, summary = undisturbed
    assert summary["kinds"] == {"chat": 8, "figure": 6, "image": 5, "record": 9, "text": summary["kinds"]["text"]}
    assert summary["stages"]["documents"]["dropped"] == {"broken": 1, "missing_field": 2, "no_caption": 1}
    for stage in summary["stages"].values():
        assert stage["input"] == stage["kept"] + sum(stage["dropped"].values())
    assert summary["samples"] == sum(summary["kinds"].values()) == inspect_shards(out)["samples"]
    assert {source["name"] for source in summary["sources"]} == {
        f"sources/{path.relative_to(sources)}" for path in sources.rglob("*") if path.is_file() and path.parent == sources
    } | {"sources/photos"}


def test_the_sheet_shows_every_picture_with_its_text(undisturbed, tmp_path):
    assert write_sheet(str(undisturbed[0]), tmp_path / "sheet.html", 100) == 11
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 11
    assert all(f"Boxes number {number} in a frame." in page for number in range(6))
    with pytest.raises(InputError, match="does not exist"):
        write_sheet(str(undisturbed[0]), tmp_path / "nowhere" / "sheet.html", 1)


@pytest.mark.faults
def test_a_build_killed_ten_times_gives_the_bytes_of_an_undisturbed_one(undisturbed, sources, tmp_path):
    (tmp_path / "templates.json").write_text(json.dumps(TEMPLATES), encoding="utf-8")
    command = [
        sys.executable, "-m", "moexpand", "data", "build", f"sources=[{sources}]", f"out={tmp_path / 'out'}",
        "tokenizer=qwen-8192", "workers=2",
        "shard_samples=16", f"templates={tmp_path / 'templates.json'}", "chat.enable_thinking=false",
    ]  # fmt: skip
    rng, killed, seconds = random.Random(0), 0, 3.0
    for _ in range(4 * KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            assert not (tmp_path / "out").exists()
        else:
            assert process.returncode == 0, process.stdout.read()
        process.stdout.close()
        if (tmp_path / "out").exists():
            break
        seconds = 3.0 if killed < KILLS else 300.0
    assert killed == KILLS
    assert digests(tmp_path / "out") == digests(undisturbed[0])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "templates.json"}


def test_sources_that_were_read_are_not_read_again(sources, tmp_path, undisturbed):
    said: list[str] = []

    def stop_at_the_first_shard(line: str) -> None:
        said.append(line)
        if line.startswith("shard-000001"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(None, [str(sources)], tmp_path / "out", options(), stop_at_the_first_shard)
    assert not (tmp_path / "out").exists()
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.building" / "shards").glob("shard-*")}
    again: list[str] = []
    build_dataset(None, [str(sources)], tmp_path / "out", options(), again.append)
    assert again[0].startswith(f"going on: {len(said) - 3} of {len(said) - 2} sources") or again[0].startswith("going on: ")
    assert not [line for line in again if "paper-" in line]
    assert {path.name: time_ns for path, time_ns in began.items() if path.name.startswith("shard-000000")} == {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-000000*")
    }
    assert digests(tmp_path / "out") == digests(undisturbed[0])


def test_a_changed_option_reads_anew_what_depends_on_it(sources, tmp_path):
    out = tmp_path / "out"
    for characters in (6000, 800):
        try:
            build_dataset(None, [str(sources / "notes.md")], out, BuildOptions(ReadOptions("qwen-8192", characters), 1), _stop)
        except KeyboardInterrupt:
            time.sleep(0)
    summary = build_dataset(
        None, [str(sources / "notes.md")], out, BuildOptions(ReadOptions("qwen-8192", 800), 1), lambda line: None
    )
    fresh = build_dataset(
        None, [str(sources / "notes.md")], tmp_path / "fresh", BuildOptions(ReadOptions("qwen-8192", 800), 1), lambda line: None
    )
    assert summary == fresh
    assert digests(out) == digests(tmp_path / "fresh")


def _stop(line: str) -> None:
    raise KeyboardInterrupt


def test_two_builds_of_one_target_do_not_meet(sources, tmp_path):
    with Workplace(tmp_path / "out"), pytest.raises(InputError, match=r"Another build of .*out is running"):
        build_dataset(None, [str(sources)], tmp_path / "out", options(), lambda line: None)


def test_near_duplicates_go_whatever_file_they_come_from(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    body = prose(1, 200)
    (folder / "b.txt").write_text(body + " A last word.", encoding="utf-8")
    (folder / "a.txt").write_text(body, encoding="utf-8")
    (folder / "c.txt").write_text(prose(2, 200), encoding="utf-8")
    summary = build_dataset(None, [str(folder)], tmp_path / "out", BuildOptions(ReadOptions("qwen-8192"), 1), lambda line: None)
    assert summary["stages"]["samples"]["dropped"] == {"near_text": 1}
    assert summary["samples"] == 2


@pytest.mark.parametrize("change", ["another", "gone"])
def test_a_picture_of_a_conversation_that_changed_in_between_is_read_anew(tmp_path, change):
    folder = tmp_path / "chats"
    folder.mkdir()
    drawing = folder / "drawing.png"
    Image.new("RGB", (64, 64), "red").save(drawing)
    question = {"role": "user", "content": [{"type": "image", "image": "drawing.png"}, {"type": "text", "text": "What is this?"}]}
    answers = [prose(70 + i, 30) for i in range(2)]
    chats = [
        {"messages": [asked, {"role": "assistant", "content": answer}]}
        for asked, answer in zip([question, {"role": "user", "content": "And now?"}], answers, strict=True)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    build = BuildOptions(ReadOptions(tokenizer="qwen-8192"), 1)

    def stop_when_read(line: str) -> None:
        if line.startswith("[1/1]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(None, [str(folder / "chats.jsonl")], tmp_path / "out", build, stop_when_read)
    if change == "gone":
        drawing.unlink()
    else:
        Image.new("RGB", (64, 64), "blue").save(drawing)
    said: list[str] = []
    build_dataset(None, [str(folder / "chats.jsonl")], tmp_path / "out", build, said.append)
    assert not said[0].startswith("going on")
    build_dataset(None, [str(folder / "chats.jsonl")], tmp_path / "fresh", build, lambda line: None)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
