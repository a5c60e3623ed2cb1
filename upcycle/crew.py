"""The threads of one process at work on shards: they take jobs of the same shard, and claim the next when none is left."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from moexpand.base.claims import Claims
from moexpand.base.files import disk_errors
from moexpand.upcycle.direct import OutputFile, write_all
from moexpand.upcycle.jobs import Bundle, Job, Task
from moexpand.upcycle.layout import Layout
from moexpand.upcycle.partial import PartialFolder
from moexpand.upcycle.reading import PIECE, Reader
from moexpand.upcycle.recipe import Recipe

LONG = 4 * PIECE
"""Tasks longer than this are begun first, so that none of them is left alone at the end of a shard."""

Progress = Callable[[int], None]
"""Told the number of bytes done since the last call; called from several threads."""


@dataclass
class Shard:
    """A shard in work.

    Attributes:
        left: tasks that are not done.
        digests: of each tensor, (offset, raw SHA-256, bytes) of the pieces that are done.
    """

    file: str
    path: Path
    left: int
    output: OutputFile | None = None
    digests: dict[str, list[tuple[int, bytes, int]]] = field(default_factory=dict)


class Crew:
    """Writes the shards of `partial` that nobody else writes.

    Args:
        progress: told the bytes that this process has put into place.
        found: told the bytes of shards that others, or an earlier run, have finished.

    Attributes:
        stopping: set it to stop all threads after their current piece.
        read, written, shared: bytes read from the parent, written, and shared by reflinks instead of written.
    """

    def __init__(
        self, recipe: Recipe, partial: PartialFolder, claims: Claims, reflink: bool, progress: Progress, found: Progress
    ) -> None:
        self.recipe, self.partial, self.claims, self.reflink = recipe, partial, claims, reflink
        self.layout: Layout = partial.layout
        self.progress, self.found = progress, found
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.queue: deque[tuple[Shard, Task]] = deque()
        self.shards: dict[str, Shard] = {}
        self.known: set[str] = set()
        self.bundles = self._by_shard()
        self.read = self.written = self.shared = 0

    def look(self) -> list[str]:
        """Files of all finished shards; `found` hears of those that are new."""
        finished = self.partial.finished()
        for file in finished:
            if file not in self.known:
                self.known.add(file)
                self.found(self.layout.sizes[file])
        return finished

    def work(self) -> None:
        """Do tasks until nothing is left to claim; for any number of threads at once."""
        reader = Reader(self.recipe.parent)
        try:
            while not self.stopping.is_set() and (task := self._next()) is not None:
                self._do(*task, reader)
        finally:
            reader.close()
            with self.lock:
                self.read += reader.count

    def ready(self) -> bool:
        """Whether there is something to do for `work`; claims a shard if need be."""
        with self.lock:
            return self._filled()

    def abandon(self) -> None:
        """Remove the shards in work; no thread works any more."""
        for shard in self.shards.values():
            if shard.output is not None:
                shard.output.close()
            with suppress(OSError):
                shard.path.unlink(missing_ok=True)
        self.shards.clear()
        self.queue.clear()

    # ------------------------------------------------------------ shards

    def _next(self) -> tuple[Shard, Task] | None:
        """The next task, of a new shard when the ones in work have none left."""
        with self.lock:
            return self.queue.popleft() if self._filled() else None

    def _filled(self) -> bool:
        with disk_errors(f"working in {self.partial.folder}"):
            while not self.queue:
                file = self._claim()
                if file is None:
                    return False
                self._open(file)
        return True

    def _claim(self) -> str | None:
        self.partial.check_same()
        finished = set(self.look())
        for file in self.layout.sizes:
            if file in finished or file in self.shards or self.claims.take(file) is None:
                continue
            if not self.partial.is_finished(file):  # meanwhile
                return file
            self.claims.release(file)
        return None

    def _open(self, file: str) -> None:
        if self.claims.took_over(file):
            self.partial.sweep(self.claims)
        tasks = sorted(self._tasks(file), key=lambda task: -(sum(job.nbytes for job in task) // LONG))
        path = self.partial.writing / f"{file}.{self.claims.held[file][1].token}"
        shard = self.shards[file] = Shard(file, path, len(tasks))
        with disk_errors(f"writing {file} to {self.partial.folder}"):
            shard.output = OutputFile(path, self.layout.sizes[file], reserve=not self.reflink)
            write_all(shard.output.ordinary, self.layout.header(file), 0)
        self.queue.extend((shard, task) for task in tasks)

    def _tasks(self, file: str) -> list[Task]:
        """Tasks of a shard. The recipe's bundles are gone through once, as long as shards are asked for in order."""
        for _ in range(2):
            for found, bundles in self.bundles:
                if found == file:
                    return [task for bundle in bundles for task in bundle.tasks]
            self.bundles = self._by_shard()
        raise RuntimeError(f"the recipe has no bundle for {file}")

    def _by_shard(self) -> Iterator[tuple[str, Iterable[Bundle]]]:
        return groupby(self.recipe.bundles(), key=lambda bundle: str(self.layout.tensors[bundle.tensors[0]].file))

    def _seal(self, shard: Shard) -> None:
        """Make a shard whose jobs are done durable, and record it."""
        assert shard.output is not None
        checksums = {name: self._pieces(shard, name) for name in self.layout.shards[shard.file]}
        with disk_errors(f"writing {shard.file} to {self.partial.folder}"):
            shard.output.sync()
            shard.output.close()
            shard.output = None
            self.known.add(shard.file)
            try:
                self.partial.finish(shard.file, shard.path, checksums)
            except OSError:
                if self._ours(shard) and not self.partial.is_finished(shard.file):
                    raise
                shard.path.unlink(missing_ok=True)
            else:
                self.progress(self.layout.tensors[self.layout.shards[shard.file][0]].start)  # the header
        with self.lock:
            del self.shards[shard.file]
            self.claims.release(shard.file)

    def _pieces(self, shard: Shard, name: str) -> list[str]:
        """SHA-256 of each piece of a tensor; the recipe has to fill it without holes, in pieces of one size."""
        pieces = sorted(shard.digests.get(name, []))
        size = self.layout.tensors[name].nbytes
        step = size // max(1, len(pieces))
        due = [(number * step, step) for number in range(len(pieces))]
        if step * len(pieces) != size or [(offset, length) for offset, _, length in pieces] != due:
            raise RuntimeError(f"the recipe does not fill {name} in pieces of one size")
        return [digest.hex() for _, digest, _ in pieces]

    def _ours(self, shard: Shard) -> bool:
        """Whether this process still holds a shard; one that was taken for dead, and outrun, does not."""
        with suppress(OSError):
            return self.claims.holds(shard.file)
        return False

    # ------------------------------------------------------------ bytes

    def _do(self, shard: Shard, task: Task, reader: Reader) -> None:
        for job in task:
            digest = self._write(shard, job, reader)
            if self.stopping.is_set():
                return
            with self.lock:
                for place in job.places:
                    shard.digests.setdefault(place.tensor, []).append((place.offset, digest, job.nbytes))
        with self.lock:
            shard.left -= 1
            last = shard.left == 0
        if last:
            self._seal(shard)

    def _write(self, shard: Shard, job: Job, reader: Reader) -> bytes:
        """Write a job's content to all its places and return its SHA-256; ends early when all threads are to stop."""
        digest = hashlib.sha256()
        begin = 0
        for piece in reader.pieces(job):
            if self.stopping.is_set():
                return b""
            digest.update(piece)
            self._put(shard, job, begin, piece)
            begin += len(piece)
        return digest.digest()

    def _put(self, shard: Shard, job: Job, begin: int, piece: memoryview) -> None:
        """Write a piece to all its places; where the file system can, all but the first share the blocks of the first."""
        assert shard.output is not None
        first: int | None = None
        shared = 0
        for place in job.places:
            offset = self.layout.tensors[place.tensor].start + place.offset + begin
            if self.reflink and first is not None and shard.output.clone(first, offset, len(piece)):
                shared += len(piece)
                continue
            with disk_errors(f"writing {place.tensor} to {shard.file} of {self.partial.folder}"):
                shard.output.write(piece, offset)
            first = offset if first is None else first
        amount = len(piece) * len(job.places)
        with self.lock:
            self.written += amount - shared
            self.shared += shared
        self.progress(amount)


def default_workers() -> int:
    """Threads that keep cores and disk busy: two a core, since one of them waits for the disk; more than 16 gain nothing."""
    return min(2 * (os.cpu_count() or 1), 16)


def run_threads(work: Callable[[], None], count: int, stopping: threading.Event) -> None:
    """Run `work` on threads (reads, writes and hashes leave the interpreter lock); it ends early when `stopping` is set.

    The first error, an interrupt included, sets `stopping` and is raised when all have ended.
    """
    with ThreadPoolExecutor(max_workers=count, thread_name_prefix="copy") as pool:
        try:
            futures = [pool.submit(work) for _ in range(count)]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stopping.set()
            raise
