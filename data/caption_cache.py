"""Answers of models on disk, keyed by what was asked: a run that is started again pays for nothing twice.

One SQLite file. A key is a SHA-256 over the whole request (model, prompt as rendered, bytes of the image, sampling parameters),
so that an answer holds for exactly what was asked and for nothing else; where the server stands does not enter. Every paid answer
is one
transaction, also one that is judged bad: the judgement is made anew when it is read.

Why SQLite and not lines in a file: memory stays bounded for millions of answers, and its write-ahead log has a checksum over
every frame, so that what a kill leaves half-written is dropped when the file is opened again. The log is used in exclusive
locking mode: it needs no shared memory, which file systems of clusters lack, and a second run on the same cache is refused, since
it would pay for the same answers. `synchronous=NORMAL`: a killed process loses nothing; a machine that loses power may lose the
last answers, never the file.
"""

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors

VERSION = 1
_APPLICATION = 0x6D6F6561  # "moea": says whose file this is
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, crc32 INTEGER NOT NULL)"""


@dataclass(frozen=True)
class Reply:
    """What a model answered, before it is judged.

    Attributes:
        text: the answer, valid Unicode.
        finish: why the model stopped: "stop", "length", ...; empty where the server did not say.
        prompt_tokens, completion_tokens: as the server counted them; None where it did not say.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AnswerCache:
    """The answers in `file`, which is made when it does not exist. A context manager; of one thread at a time.

    Raises:
        InputError: the file is something else, of another version, or in use by another run.
        EnvironmentFailure: the disk is full, the file is damaged, ...
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        with disk_errors(f"making {self.file.parent}"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._base = sqlite3.connect(self.file, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._open()
        except BaseException:
            self._base.close()
            raise

    def _open(self) -> None:
        # The order matters: with exclusive locking set before the first access, the log works without shared memory.
        self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.execute("BEGIN IMMEDIATE")
        application, version = (self._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        tables = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != _APPLICATION:
            raise InputError(f"{self.file} is a database of another program; choose another folder for the answers of models.")
        if tables and version != VERSION:
            raise InputError(
                f"{self.file} has format version {version}, and this release reads {VERSION}; choose another folder."
            )
        self._base.execute(_TABLE)
        self._base.execute(f"PRAGMA application_id={_APPLICATION}")
        self._base.execute(f"PRAGMA user_version={VERSION}")
        self._base.execute("COMMIT")

    def get(self, key: bytes) -> Reply | None:
        """The answer under a key, or None. One whose text does not match its CRC32 is not there: it is asked for again."""
        with self._errors():
            row = self._base.execute(
                "SELECT text, finish, prompt_tokens, completion_tokens, crc32 FROM answers WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        text, finish, prompt_tokens, completion_tokens, crc32 = row
        if not isinstance(text, str) or zlib.crc32(text.encode()) != crc32:
            return None
        return Reply(text, finish, prompt_tokens, completion_tokens)

    def put(self, key: bytes, model: str, reply: Reply) -> None:
        """Keep an answer, in place of an earlier one under this key. When this returns, a kill cannot take it away."""
        row = (
            key,
            model,
            reply.text,
            reply.finish,
            reply.prompt_tokens,
            reply.completion_tokens,
            zlib.crc32(reply.text.encode()),
        )
        with self._errors():
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def totals(self) -> dict[str, dict[str, int]]:
        """By model: the answers held, and the prompt and completion tokens they cost in all runs together."""
        names = "answers", "prompt_tokens", "completion_tokens"
        with self._errors():
            rows = self._base.execute(
                "SELECT model, count(*), total(prompt_tokens), total(completion_tokens) FROM answers GROUP BY model ORDER BY "
                "model"
            ).fetchall()
        return {model: dict(zip(names, map(int, values), strict=True)) for model, *values in rows}

    def close(self) -> None:
        """Close the file; another run may open it then."""
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what SQLite reports into sentences."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise InputError(
                    f"{self.file} is in use by another run, which is paying for the same answers; wait for it or choose another "
                    "folder."
                ) from error
            if name.startswith("SQLITE_NOTADB"):
                raise InputError(
                    f"{self.file} is not a cache of answers; choose another folder or move the file away."
                ) from error
            if name.startswith("SQLITE_CORRUPT"):
                raise EnvironmentFailure(
                    f"{self.file} is damaged ({error}); move it away, and its answers are asked for again."
                ) from error
            if name.startswith("SQLITE_FULL"):
                raise EnvironmentFailure(
                    f"The disk is full while writing {self.file}; free some space and start again."
                ) from error
            raise EnvironmentFailure(f"{error} ({name}) in {self.file}.") from error
