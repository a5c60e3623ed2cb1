"""The tables of a run folder: rows with a `step`, a line of JSON each, every step once. Nothing here imports torch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, write_atomic

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"

Rows = list[dict[str, Any]]


class Table:
    """A .jsonl file of rows with a `step`; going on from step N first removes what an interrupted run wrote beyond it.

    Below 0 that is everything.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in read_rows(path) if row["step"] <= step] if step >= 0 else []
        self.steps = {row["step"] for row in kept}
        with disk_errors(f"writing {path}"):
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run, see close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system; JSON has no NaN, so numbers that are not finite become null."""
        with disk_errors(f"writing {self.path}"):
            finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> Rows:
    """All rows of a table; none where there is no file. What follows the last line break was cut off in the middle.

    Raises:
        InputError: a whole line is damaged.
    """
    if not path.exists():
        return []
    with disk_errors(f"reading {path}"):
        lines = path.read_bytes().split(b"\n")[:-1]
    return [_row(line, number, path) for number, line in enumerate(lines, 1) if line]


def _row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise InputError(f"{path} is damaged: line {number} is no JSON object with a step; remove that line.")
    return row


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `key`, float64; NaN for null and for what is no finite number."""
    having = [row for row in rows if key in row]
    return np.array([row["step"] for row in having], dtype=float), np.array([_number(row[key]) for row in having], dtype=float)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
