"""The tables of a run folder: rows with a `step`, a line of JSON each, every step once. Nothing here imports torch."""

import errno
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.failpoints import failpoint
from moexpand.base.files import disk_errors, write_atomic

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
EVENTS = "events.jsonl"

Rows = list[dict[str, Any]]


class Table:
    """A .jsonl file of rows with a `step`, which a run adds to.

    A disk that cannot take a row does not stop the run: rows wait in memory and follow when it can again.

    Args:
        step: going on from this step first removes the rows beyond it, which an interrupted run wrote; below 0 that is all.
        say: where a line goes when rows have to wait, and when they no longer do.
    """

    def __init__(self, path: Path, step: int, say: Callable[[str], None] = print) -> None:
        self.path, self._say = path, say
        self.rows = [row for row in read_rows(path) if row["step"] <= step] if step >= 0 else []
        self._waiting: list[bytes] = []
        with disk_errors(f"writing {path}"):
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run, see close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system; JSON has no NaN, so numbers that are not finite become null."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        waited = bool(self._waiting)
        self._waiting.append(json.dumps(finite).encode() + b"\n")
        try:
            with disk_errors(f"writing {self.path}"):
                self._write_waiting()
        except EnvironmentFailure as error:
            if not waited:
                self._say(f"WARNING: {error} Training goes on; rows wait in memory until the disk can take them.")
            return
        if waited:
            self._say(f"{self.path} is written again; nothing is missing.")

    def _write_waiting(self) -> None:
        failpoint("table.append")
        lines, end = b"".join(self._waiting), self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(lines)
        except OSError:
            self._file.truncate(end)
            raise
        if written != len(lines):  # no room for all of it, and half a row is none
            self._file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = []

    def close(self) -> None:
        """Try once more to write what waits."""
        if self._waiting:
            with suppress(OSError):
                self._write_waiting()
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
