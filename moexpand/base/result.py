"""How workers tell their launcher how they ended: torchrun turns every failure into exit code 1, so the result is a file."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.files import disk_errors

FILE_NAME = "exit.json"


@dataclass(frozen=True)
class Result:
    """The end of a run: an exit code (base/errors.py) and one sentence, empty when all went well."""

    code: int
    message: str


def write_result(folder: Path, code: int, message: str, attempt: str = "") -> None:
    """Leave the result in `folder`; a rank does so as its last act. The first result of an attempt stays;
    one of an earlier attempt (another run of torchrun) is replaced.

    A rank that fails alone writes its reason, and torchrun then stops the peers: what they would say comes later and says less.
    """
    path = Path(folder) / FILE_NAME
    with disk_errors(f"writing {path}"):
        if _attempt_of(path) != attempt:
            path.unlink(missing_ok=True)
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
            json.dump({"code": code, "message": message, "attempt": attempt}, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())


def _attempt_of(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("attempt", ""))
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def read_result(folder: Path) -> Result | None:
    """Read the result; None when the workers wrote none, or died while they wrote it."""
    try:
        content = json.loads((Path(folder) / FILE_NAME).read_text(encoding="utf-8"))
        return Result(int(content["code"]), str(content["message"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def remove_result(folder: Path) -> None:
    """Remove what an earlier run wrote, so that it cannot be taken for the next one's."""
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
