"""Files that are whole or absent: atomic writes, folders published by one rename, checksums, disk errors as sentences."""

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moexpand.base.errors import EnvironmentFailure, InputError

PARTIAL = ".partial"
READ_CHUNK = 8 << 20


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` raised inside into an `EnvironmentFailure` that says what was being done.

    Args:
        action: what is being done and to what, such as "writing /runs/child".
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFailure(f"The disk is full while {action}; free some space and start again.") from error
        where = f" ({error.filename})" if error.filename else ""
        raise EnvironmentFailure(f"{error.strerror or error} while {action}{where}.") from error


def fsync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write `content` under a temporary name, fsync it and rename it to `path`: readers see the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(f"writing {path}"):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is an `InputError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None


def refuse_existing(target: Path) -> None:
    """An `InputError` when something stands under the name of a folder that is to be written; an empty folder does not count."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already and is not an empty folder; choose another target or remove it.")


def refuse_inside(target: Path, source: Path) -> None:
    """An `InputError` when a folder that is to be written lies in the one that it is made of."""
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} lies in the source {source}, which must stay as it is; choose a target beside it.")


def publish_folder(building: Path, target: Path) -> None:
    """Make every file of a folder durable and give the folder its name by one rename.

    Args:
        building: on the same disk as `target`.
        target: does not exist, or is an empty folder.

    Raises:
        EnvironmentFailure: the disk is full, read-only, ...
    """
    with disk_errors(f"writing {target}"):
        for file in sorted(path for path in building.rglob("*") if path.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for folder in sorted((path for path in building.rglob("*") if path.is_dir()), reverse=True):
            fsync_folder(folder)
        fsync_folder(building)
        if target.exists():
            target.rmdir()
        os.rename(building, target)
        fsync_folder(target.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Build a folder under a temporary name and publish it as `target` by one rename.

    Yields the temporary folder, beside the target. When the body succeeds every file in it is already durable by its own
    writer or is fsynced here; when the body fails the temporary folder is removed and nothing stands under the target's name.

    Raises:
        InputError: `target` exists and is not an empty folder.
        EnvironmentFailure: the disk is full, read-only, ...
    """
    target = Path(target)
    refuse_existing(target)
    building = target.with_name(f".{target.name}{PARTIAL}")
    with disk_errors(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if building.exists():
            shutil.rmtree(building)
        building.mkdir()
        try:
            yield building
            publish_folder(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


@dataclass(frozen=True)
class Fact:
    """Size and checksum of a file: XXH3 of 128 bits, which finds damage at the speed of memory and is no proof against intent."""

    bytes: int
    xxh3: str


class HashedFile(io.RawIOBase):
    """A new file that is written from front to back, hashed on the way and durable when it is closed without an error.

    The checksum is of the bytes that were given, so that it also finds what the disk lost.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._digest = xxhash.xxh3_128()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._bytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        super().__exit__(kind, *details)

    @property
    def fact(self) -> Fact:
        """Of what was written so far."""
        return Fact(self._bytes, self._digest.hexdigest())


def fact_of(path: Path) -> Fact:
    """Size and checksum of a file as it lies on the disk."""
    digest, size, piece = xxhash.xxh3_128(), 0, memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return Fact(size, digest.hexdigest())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
