"""What jobs put into a child, read from the parent or made, as one thread goes through it."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from moexpand.upcycle.checkpoint import Checkpoint, read_into
from moexpand.upcycle.direct import MARGIN, InputFile, aligned_buffer
from moexpand.upcycle.jobs import Job, Made, Stream

PIECE = 16 << 20
"""Bytes of a job that are handled at a time."""

KEPT = 2
"""Ranges of the parent's files that are kept for the next piece that is made: as many as an expert's stack has matrices."""


class OneFile:
    """The file that a thread reads at the moment."""

    def __init__(self) -> None:
        self.current: InputFile | None = None

    def open(self, path: Path) -> InputFile:
        """A file, to use until the next call."""
        if self.current is None or self.current.path != path:
            self.close()
            self.current = InputFile(path)
        return self.current

    def close(self) -> None:
        """Close what is open."""
        if self.current is not None:
            self.current.close()
            self.current = None


class Reader:
    """The content of jobs, for one thread.

    Attributes:
        count: bytes read from the parent.
    """

    def __init__(self, parent: Checkpoint) -> None:
        self.parent = parent
        self.count = 0
        self._file = OneFile()
        self._buffer: memoryview | None = None
        self._range = lru_cache(maxsize=KEPT)(self._read)

    def pieces(self, job: Job) -> Iterator[memoryview]:
        """A job's bytes in pieces of `PIECE` bytes, the last of them shorter, that begin at a page and last until the next."""
        if self._buffer is None:
            self._buffer = aligned_buffer(PIECE + MARGIN)
        done = 0
        for piece in self._gathered(job.content) if isinstance(job.content, Made) else self._streamed(job.content):
            yield piece
            done += len(piece)
        if done != job.nbytes:
            raise RuntimeError(f"{job.origin} came with {done:,} bytes instead of {job.nbytes:,}")

    def close(self) -> None:
        """Close files and let go of memory."""
        self._file.close()
        self._range.cache_clear()
        self._buffer = None

    def _streamed(self, content: Stream) -> Iterator[memoryview]:
        assert self._buffer is not None
        info = self.parent.info(content.tensor)
        for begin in range(content.start, content.stop, PIECE):
            size = min(PIECE, content.stop - begin)
            self.count += size
            yield self._file.open(info.file).read(self._buffer, info.start + begin, size)

    def _gathered(self, content: Made) -> Iterator[memoryview]:
        """Computed pieces of any sizes, as pieces that fill the buffer."""
        assert self._buffer is not None
        buffer = self._buffer[:PIECE]
        target = np.frombuffer(buffer, dtype=np.uint8)
        filled = 0
        for part in content.pieces(self._range):
            rest = np.frombuffer(part, dtype=np.uint8)
            while rest.size:
                count = min(rest.size, target.size - filled)
                target[filled : filled + count] = rest[:count]
                filled, rest = filled + count, rest[count:]
                if filled == target.size:
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def _read(self, file: Path, start: int, stop: int) -> memoryview:
        data = memoryview(bytearray(stop - start))
        read_into(self._file.open(file).ordinary, data, start, file)
        self.count += len(data)
        return data.toreadonly()
