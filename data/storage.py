"""Bytes of a shard folder, on a local disk or at an address that fsspec knows (s3://, https://, gs://, memory://)."""

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, write_atomic

OPEN_FILES = 256
"""Shards kept open; a folder may hold more than a process may open."""
ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.5

Result = TypeVar("Result")


class Storage(Protocol):
    """A folder of shards."""

    place: str
    """Path or address, for messages."""

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            FileNotFoundError: there is none of this name.
        """

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError likewise."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Part of a file; shorter where the file ends."""


def open_storage(place: str, cache: Path | None = None, cache_bytes: int = 0) -> Storage:
    """The folder at a path or address.

    Args:
        place: path, or an address with "://".
        cache: local folder into which remote shards are copied whole before they are read; None reads ranges of them.
        cache_bytes: how much the folder may hold; the shards copied longest ago make room.

    Raises:
        InputError: fsspec does not know the address, or the package that speaks its protocol is missing.
    """
    if "://" not in place:
        return LocalStorage(Path(place))
    remote = RemoteStorage(place)
    return remote if cache is None else CachedStorage(remote, cache, cache_bytes)


class LocalStorage:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        return (self._folder / name).read_bytes()

    def size(self, name: str) -> int:
        """See `Storage`."""
        return (self._folder / name).stat().st_size

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY)
            while len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(name)
        return os.pread(self._open[name], size, offset)

    def forget(self, name: str) -> None:
        """Close a file that is to be removed."""
        if name in self._open:
            os.close(self._open.pop(name))

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class RemoteStorage:
    """A folder at an address; failures are tried again, with longer and longer waits."""

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise InputError(f"The address {place} cannot be read: {error}.") from None

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        return self._try(name, lambda: self._files.cat_file(self._path(name)))

    def size(self, name: str) -> int:
        """See `Storage`."""
        return int(self._try(name, lambda: self._files.info(self._path(name))["size"]))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        return self._try(name, lambda: self._files.cat_file(self._path(name), start=offset, end=offset + size))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _try(self, name: str, attempt: Callable[[], Result]) -> Result:
        wait = FIRST_WAIT_SECONDS
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except Exception as error:  # every protocol's library has errors of its own
                if number == ATTEMPTS - 1:
                    problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    raise EnvironmentFailure(
                        f"{self.place}/{name} could not be read in {ATTEMPTS} attempts ({problem}); check the network, then start"
                        " again."
                    ) from error
                time.sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")


class CachedStorage:
    """A remote folder whose shards are copied whole into a local folder, which several processes may share."""

    def __init__(self, remote: RemoteStorage, folder: Path, limit: int) -> None:
        self.place = remote.place
        self._remote, self._limit = remote, limit
        self._folder = folder / hashlib.sha256(remote.place.encode()).hexdigest()[:16]
        with disk_errors(f"writing {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._local = LocalStorage(self._folder)

    def read(self, name: str) -> bytes:
        """See `Storage`; small files are not kept."""
        return self._remote.read(name)

    def size(self, name: str) -> int:
        """See `Storage`."""
        return self._remote.size(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """See `Storage`."""
        try:
            return self._local.read_range(name, offset, size)
        except FileNotFoundError:
            content = self._remote.read(name)
            self._make_room(len(content))
            write_atomic(self._folder / name, content)
            return content[offset : offset + size]

    def _make_room(self, needed: int) -> None:
        held: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            held.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in held) + needed
        for _, size, path in sorted(held, key=lambda file: file[:2]):
            if total <= self._limit:
                return
            self._local.forget(path.name)
            path.unlink(missing_ok=True)
            total -= size
