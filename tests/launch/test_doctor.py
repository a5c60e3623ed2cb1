"""What the doctor says, on this machine and on worse ones."""

import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from moexpand.launch import doctor
from moexpand.launch.doctor import MISSING, NOTE, OK, WRONG, Finding, examine
from tests.commands import ROOT, run_here


def _found(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(folder)}


def test_this_machine_can_train_and_figures_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("doctor", f"folder={tmp_path / 'not' / 'yet'}", "format=json") == 0
    findings = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["found"] == metadata.version("torch")
    assert findings["megatron-core"]["state"] == OK
    assert f" of {os.cpu_count()} cores" in findings["processor"]["found"]
    assert f"of {psutil.virtual_memory().total / 2**30:.1f} GiB" in findings["memory"]["found"]
    assert findings["disk"]["found"].endswith(f"at {tmp_path}")
    assert findings["locks"]["found"] == "work"
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_every_finding_that_is_not_well_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for finding in _found(tmp_path).values():
        assert (finding.state == OK) == (not finding.cost), finding
        assert finding.state not in (WRONG, MISSING) or finding.mend, finding
    assert run_here("doctor", f"folder={tmp_path}") == 0
    page = capsys.readouterr().out
    assert "Transformer Engine" in page
    assert "costs: " in page
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize(
    ("package", "version", "told"),
    [
        ("megatron-core", "0.19.2", "0.16.1"),
        ("megatron-core", None, "0.16.1"),
        ("torch", "2.4.1+cu121", "2.13"),
        ("torch", None, ""),
    ],
)
def test_what_nothing_works_without_is_exit_code_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    version: str | None,
    told: str,
) -> None:
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == package else true(name))
    found = _found(tmp_path)[package]
    assert found.state == WRONG
    assert told in found.cost + found.mend
    assert run_here("doctor", f"folder={tmp_path}") == 1
    assert f"Training cannot work here because of {package};" in capsys.readouterr().err


def test_limits_of_a_process_are_seen(tmp_path: Path) -> None:
    command = f"ulimit -n 256; exec {sys.executable} -m moexpand doctor folder={tmp_path} format=json"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    findings = {each["name"]: each for each in json.loads(done.stdout)}
    assert findings["open files"]["found"].startswith("256 ")
    assert findings["open files"]["mend"] == "ulimit -n 65536"


def test_a_host_without_a_name_and_a_disk_without_room_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = _found(tmp_path)
    assert found["host name"].state == NOTE
    assert "does not resolve" in found["host name"].found
    assert found["disk"].state == WRONG
    assert "read-only" in found["disk"].found


def test_gpus_that_torch_cannot_use_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver and cards are there, and torch was built for CPUs: the commonest reason for a job that crawls."""
    said = {"nvidia-smi": "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"}
    monkeypatch.setattr(doctor, "_said", lambda program, *words: said.get(program, ""))
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/usr/bin/{program}" if program in said else None)
    found = _found(tmp_path)["GPUs"]
    assert found.state == WRONG
    assert "H100" in found.found
    assert "torch is built for CPUs" in found.cost
