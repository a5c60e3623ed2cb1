"""Where a build works until it is done: a hidden folder beside the target, which a build that was killed goes on from.

.OUT.building/lock        held by the running build
.OUT.building/units/      a folder for every source that has been read, named by what decides its content
.OUT.building/written/    what is known of every shard that has been written
.OUT.building/shards/     becomes OUT
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, publish_folder, read_json, refuse_existing, write_json
from moexpand.data.index import index_name
from moexpand.data.shards import shard_name


class Workplace:
    """The hidden folder of one target; a context manager that holds its lock.

    Raises:
        InputError: the target exists and is not an empty folder, or another build of it is running.
    """

    def __init__(self, out: Path) -> None:
        refuse_existing(out)
        self.out = out
        self.folder = out.parent / f".{out.name}.building"
        self.units, self.shards = self.folder / "units", self.folder / "shards"
        self._written = self.folder / "written"

    def __enter__(self) -> Self:
        with disk_errors(f"writing {self.folder}"):
            for folder in (self.units, self.shards, self._written):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"Another build of {self.out} is running; wait for its end, or choose another target.") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)

    def unit(self, digest: str) -> tuple[Path, bool]:
        """Folder of a source that is to be read, and whether it has been."""
        folder = self.units / digest
        if folder.is_dir():
            return folder, True
        partial = self.units / f"{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return partial, False

    def unit_done(self, partial: Path) -> Path:
        """Give the folder of a source that has been read its name."""
        folder = partial.with_suffix("")
        os.rename(partial, folder)
        return folder

    def forget(self, folder: Path) -> None:
        """A source that has been read is to be read again."""
        shutil.rmtree(folder)

    def written(self, number: int, digest: str) -> dict[str, Any] | None:
        """What dataset.json says of a shard, where the shard of this content has been written whole."""
        record = self._written / f"{number:06d}.json"
        name = shard_name(number)
        if record.is_file() and (self.shards / name).is_file() and (self.shards / index_name(name)).is_file():
            known = read_json(record)
            if known["digest"] == digest:
                entry: dict[str, Any] = known["entry"]
                return entry
        return None

    def shard_done(self, number: int, digest: str, entry: dict[str, Any]) -> None:
        """Remember a shard that has been written."""
        write_json(self._written / f"{number:06d}.json", {"digest": digest, "entry": entry})

    def publish(self, shards: int) -> None:
        """Move the shards under the target's name and remove everything else."""
        wanted = {name for number in range(shards) for name in (shard_name(number), index_name(shard_name(number)))}
        for path in self.shards.iterdir():
            if path.name.startswith("shard-") and path.name not in wanted:
                path.unlink()
        publish_folder(self.shards, self.out)
        self.remove()

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def digest_of(*values: Any) -> str:
    """A name that follows from these JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode(errors="surrogateescape")).hexdigest()[:32]
