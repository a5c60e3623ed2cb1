"""A machine without package tools gets the documents of the repository, and each of them has its licence on record."""

import shutil
from pathlib import Path

from moexpand.data.sample_pdfs import SAMPLES, fetch_pdfs


def test_without_package_tools_the_samples_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    lines: list[str] = []
    found = fetch_pdfs(tmp_path / "pdfs", lines.append)
    assert [path.name for path in found] == sorted(path.name for path in SAMPLES.glob("*.pdf"))
    assert "this system has no apt-get and dpkg" in lines


def test_packages_that_cannot_be_had_are_passed_over(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg"):
        (tools / name).write_text("#!/bin/sh\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    lines: list[str] = []
    assert len(fetch_pdfs(tmp_path / "pdfs", lines.append)) == len(list(SAMPLES.glob("*.pdf")))
    assert "apt-get cannot reach a package archive" in lines


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.pdf").write_bytes(b"%PDF")
    assert fetch_pdfs(tmp_path, print) == [tmp_path / "mine.pdf"]


def test_every_sample_has_its_licence_in_the_notice():
    notice = (Path(SAMPLES) / "NOTICE.md").read_text()
    samples = sorted(SAMPLES.glob("*.pdf"))
    assert len(samples) >= 5
    assert all(f"| {sample.name} |" in notice for sample in samples)
    assert sum(sample.stat().st_size for sample in samples) < 4_000_000
