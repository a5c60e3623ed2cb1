"""A run's page is one file that needs no other, with the figures that the run has."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moexpand.cli import main


def _run(folder: Path, steps: int = 5, **more: Any) -> Path:
    """A run folder with metrics of some steps; every second has telemetry, one was skipped."""
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\nrouter:\n  gradient: ste\n")
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 100 * step, "loss": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0}
        row |= {"seconds": 1.0, "data_seconds": 0.1, "skipped": int(step == 3), "moe/load_cv": 0.5, "moe/load_max": 2.0} | more
        if step % 2:
            row |= {"moe/router_entropy": 0.9, "moe/sibling_weights": 1 - 1e-3 * step, "time/optimizer": 0.2}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    evaluation = {"step": 1, "tokens": 100, "held_out_loss": 4.5, "held_out_tokens": 10, "unigram_entropy": 6.0}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    return folder


def test_the_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    run = _run(tmp_path / "one")
    assert main(["report", f"run={run}"]) == 0
    page = (run / "report" / "index.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= 4
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "load_cv" in page
    assert "router_entropy" in page
    assert "sibling_weights" in page


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one"), _run(tmp_path / "two", loss=None)
    assert main(["report", f"run={one}", f"compare=[{two}]", f"out={tmp_path / 'both.html'}"]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "one" in page
    assert "two" in page


def test_a_run_of_one_step_without_evaluations_has_a_page(tmp_path: Path) -> None:
    run = _run(tmp_path / "short", steps=1)
    (run / "evaluations.jsonl").unlink()
    assert main(["report", f"run={run}"]) == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        assert main(["report", f"run={folder}"]) == 2
        said = capsys.readouterr().err.strip()
        assert str(folder) in said
        assert "\n" not in said
