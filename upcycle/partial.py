"""The folder beside the target where an expansion grows until one rename publishes it.

    .NAME.expanding/
        expansion.partial.json   what decides every byte: a second process, or one that resumes, must ask for the same
        work.RANDOM/
            claims/              who writes which shard
            writing/             shards in work, under names of their writers
            child/               finished shards; becomes the target
            manifests/           one file a finished shard, with the checksums of its tensors

A shard is finished when its manifest exists: it is synced and renamed into `child` before. The random name is in the first file;
a process that slept while the folder was removed and begun anew finds its own paths gone, and can spoil nothing.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moexpand.base.claims import Claims
from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import PARTIAL, disk_errors, fsync_folder, read_json, refuse_existing, write_atomic, write_json
from moexpand.upcycle.layout import Layout, make_folders

IDENTITY = "expansion.partial.json"
WORK = "work"
"""Key of the random name in the identity, and the beginning of the folder's own."""
EXPANDING = ".expanding"
"""Not the ending of folders that other commands build and clear away."""
SHOWN = 60
"""Characters of a value that a message shows."""


class PartialFolder:
    """The working folder of `target`; `begin` makes it or joins it.

    Args:
        target: the folder to write in the end.
        layout: the child's shard table.
    """

    def __init__(self, target: Path, layout: Layout) -> None:
        self.target, self.layout = Path(target), layout
        self.begun = b""
        self.folder = self.target.with_name(f".{self.target.name}{EXPANDING}")
        self._place(None)

    def _place(self, identity: Any) -> None:
        """Where everything lies by an identity; nowhere that exists without one."""
        word = identity.get(WORK) if isinstance(identity, dict) else None
        self.work = self.folder / f"{WORK}.{word}"
        self.claims, self.writing, self.child, self.manifests = (
            self.work / name for name in ("claims", "writing", "child", "manifests")
        )

    def begin(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or with `resume` go on with the one that is there.

        Args:
            identity: JSON values that decide every byte of the child.

        Raises:
            InputError: an unfinished expansion is there without `resume`, or one of another identity.
            EnvironmentFailure: the folder cannot be made.
        """
        refuse_existing(self.target)
        if self.target.is_symlink() or self.target.is_mount():
            raise InputError(
                f"{self.target} is a link or a mount point, which no folder can be renamed to; give a folder that does not exist "
                "yet, inside it for instance."
            )
        with disk_errors(f"writing {self.target}"):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.folder.mkdir()
            except FileExistsError:
                if not resume:
                    raise InputError(
                        f"An unfinished expansion stands in {self.folder}; give resume=true to go on with it, or remove it."
                    ) from None
                self._make(identity)
            else:
                try:
                    self._make(identity)
                    fsync_folder(self.folder.parent)
                except BaseException:
                    if not (self.folder / IDENTITY).exists():  # otherwise others may be at work in it already
                        shutil.rmtree(self.folder, ignore_errors=True)
                    raise
            begun = read_json(self.folder / IDENTITY)
            compare_identities(begun, identity, str(self.folder))
            self.begun = (self.folder / IDENTITY).read_bytes()
            self._place(begun)
            for part in (self.work, self.claims, self.writing, self.child, self.manifests):
                part.mkdir(exist_ok=True)
            self._forget_broken()
            try:
                refuse_existing(self.target)
            except InputError:  # published a moment ago, by the process that then removed the folder
                self.remove()
                raise

    def _make(self, identity: Mapping[str, Any]) -> None:
        """Give a folder its identity that has none yet: it is new, or its maker was killed at once."""
        if (self.folder / IDENTITY).is_file():
            return
        for path in self.folder.iterdir():
            if path.name != IDENTITY and not path.name.endswith(PARTIAL) and not path.name.startswith(f"{WORK}."):
                raise InputError(f"{self.folder} is not an unfinished expansion, since it holds {path.name}; remove it.")
        # Whoever comes first decides, and a second one, which may be here at the same time, reads what the first has written.
        word = secrets.token_hex(4)
        mine = self.folder / f"identity.{word}{PARTIAL}"
        write_json(mine, {**identity, WORK: word})
        with suppress(FileExistsError):
            os.link(mine, self.folder / IDENTITY)
        mine.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def _forget_broken(self) -> None:
        """Remove manifests whose shard is not there as it was written, so that it is written again."""
        for file in self.finished():
            if not self._whole(file):
                self._manifest(file).unlink(missing_ok=True)

    def _whole(self, file: str) -> bool:
        """Whether a shard has its size and header, and its manifest can be read."""
        header = self.layout.header(file)
        try:
            with open(self.child / file, "rb") as shard:
                same = os.fstat(shard.fileno()).st_size == self.layout.sizes[file] and shard.read(len(header)) == header
            return same and set(json.loads(self._manifest(file).read_bytes())) == set(self.layout.shards[file])
        except (OSError, ValueError):
            return False

    def _manifest(self, file: str) -> Path:
        return self.manifests / f"{Path(file).stem}.json"

    def finished(self) -> list[str]:
        """Files of the finished shards, in order."""
        there = set(os.listdir(self.manifests))
        return [file for file in self.layout.sizes if self._manifest(file).name in there]

    def same(self) -> bool:
        """Whether the folder is still the one of `begin`."""
        try:
            return (self.folder / IDENTITY).read_bytes() == self.begun
        except FileNotFoundError:
            return False

    def check_same(self) -> None:
        """An `EnvironmentFailure` when the folder has gone, or was begun anew."""
        if not self.same():
            raise EnvironmentFailure(f"{self.folder} was removed while this process worked in it; begin again.")

    def is_finished(self, file: str) -> bool:
        """Whether one shard is finished."""
        return self._manifest(file).exists()

    def finish(self, file: str, written: Path, checksums: Mapping[str, list[str]]) -> None:
        """Take over a shard, already synced, that was written as `written`.

        Args:
            checksums: hexadecimal SHA-256 of every piece of every tensor.
        """
        os.rename(written, self.child / file)
        fsync_folder(self.child)
        write_atomic(self._manifest(file), json.dumps(checksums))

    def checksums(self) -> dict[str, list[bytes]]:
        """Raw SHA-256 digests of the pieces of every tensor, in the order of the model."""
        found: dict[str, list[bytes]] = {}
        for file in self.layout.sizes:
            pieces = read_json(self._manifest(file))
            found.update((name, [bytes.fromhex(digest) for digest in digests]) for name, digests in pieces.items())
        return {name: found[name] for name in self.layout.tensors}

    def sweep(self, claims: Claims) -> None:
        """Remove from `writing` what nobody writes any more; a name there ends with the token of its writer's claim."""
        there = list(self.writing.iterdir())  # before the claims are read, since a claim is older than what is written under it
        tokens = {holder.token for holder in claims.live().values()}
        for path in there:
            if path.name.rpartition(".")[2] not in tokens:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def reserved(self) -> int:
        """Bytes on disk of shards in work."""
        total = 0
        for path in self.writing.iterdir():
            with suppress(FileNotFoundError):  # finished meanwhile
                total += path.stat().st_blocks * 512
        return total

    def publish(self, small: Path) -> None:
        """Move the files of `small` beside the shards and give everything the target's name."""
        for path in sorted(path for path in small.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            make_folders(self.child, path.relative_to(small))
            os.replace(path, self.child / path.relative_to(small))
        for folder in (*(path for path in self.child.rglob("*") if path.is_dir()), self.child):
            fsync_folder(folder)
        os.rename(self.child, self.target)  # over an empty folder, which is what the target may be
        fsync_folder(self.target.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder; of one that is not the one of `begin` any more, what this process made in it."""
        with suppress(OSError):
            shutil.rmtree(self.folder if self.same() else self.work, ignore_errors=True)
            self.folder.rmdir()  # when nothing else is in it

    def remove_remains(self) -> None:
        """Remove what the process left that published the child and was killed before it had removed the folder."""
        if (self.folder / IDENTITY).is_file():
            self._place(read_json(self.folder / IDENTITY))
        if not self.child.exists():
            shutil.rmtree(self.folder, ignore_errors=True)


def compare_identities(begun: Any, asked: Mapping[str, Any], where: str) -> None:
    """An `InputError` that names the first key in which an expansion that was begun differs from the one that is asked for."""
    begun = {key: value for key, value in begun.items() if key != WORK} if isinstance(begun, dict) else {}
    asked = json.loads(json.dumps(asked))  # as it comes back from a file: tuples are lists
    for key in [*asked, *(key for key in begun if key not in asked)]:
        if begun.get(key) != asked.get(key):
            was, now = (_shown(values.get(key)) for values in (begun, asked))
            raise InputError(
                f"The expansion in {where} was begun with {key}={was}, not {key}={now}; give the same, or remove that folder."
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
