"""Files read and written at disk speed: past the page cache in whole blocks, space reserved first, equal ranges shared.

Going past the page cache (O_DIRECT) saves a copy of every byte and the throttling of dirty pages; it wants memory, offset and
size in whole blocks. What is not aligned, and file systems that know no such access, take the ordinary way. A page is only ever
written in one of the two ways, so that they cannot overtake each other. What the page cache holds already is read from there.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from moexpand.base.files import disk_errors
from moexpand.upcycle.checkpoint import read_into
from moexpand.upcycle.safetensors_file import ALIGNMENT

FICLONERANGE = 0x4020940D
"""ioctl of linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""

MARGIN = 2 * ALIGNMENT
"""What `InputFile.read` needs in a buffer besides the bytes that it is asked for."""


def aligned_buffer(size: int) -> memoryview:
    """Zeroed writable memory that begins at a page, as direct access wants it."""
    return memoryview(mmap.mmap(-1, size))


class InputFile:
    """A file read from one thread in ranges that need not be aligned.

    Raises:
        EnvironmentFailure: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.direct: int | None = None
        with disk_errors(f"reading {path}"):
            self.ordinary = os.open(path, os.O_RDONLY)
        self.descriptors = [self.ordinary]
        with suppress(OSError):  # a file system without direct reads
            self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            self.descriptors.append(self.direct)

    def read(self, buffer: memoryview, start: int, size: int) -> memoryview:
        """Bytes [start, start + size), at the head of `buffer`, which begins at a page and has `MARGIN` bytes more than `size`.

        Raises:
            EnvironmentFailure: the file ends early or cannot be read.
        """
        done = 0
        if self.direct is not None and not _resident(self.ordinary, start, size):
            done = self._read_direct(buffer, start, size)
        if done < size:
            read_into(self.ordinary, buffer[done:size], start + done, self.path)
        return buffer[:size]

    def _read_direct(self, buffer: memoryview, start: int, size: int) -> int:
        """Read the blocks around a range and move it to the head of the buffer; returns how much of it was read."""
        skip = start % ALIGNMENT
        wanted = -(-(skip + size) // ALIGNMENT) * ALIGNMENT
        count = 0
        try:
            while count < wanted and count % ALIGNMENT == 0 and self.direct is not None:
                more = os.preadv(self.direct, [buffer[count:wanted]], start - skip + count)
                if more == 0:
                    break
                count += more
        except OSError:
            self.direct = None  # larger blocks than ours; a failing disk fails in the ordinary way as well
        done = max(0, min(size, count - skip))
        if skip and done:
            address = _address(buffer)
            ctypes.memmove(address, address + skip, done)
        return done

    def close(self) -> None:
        """Close the file."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def _address(buffer: memoryview | mmap.mmap) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def _resident(descriptor: int, start: int, size: int) -> bool:
    """Whether the page cache holds a range, so that reading it costs nothing; also when that cannot be found out."""
    # To those who may not write a file the kernel says that all of it is there, which is no answer.
    if not os.access(f"/proc/self/fd/{descriptor}", os.W_OK) and os.fstat(descriptor).st_uid != os.geteuid():
        return False
    begin = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = start + size - begin
    pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    try:
        with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=begin) as mapped:
            known = _libc().mincore(
                ctypes.c_void_p(_address(mapped)), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
            )
    except (OSError, ValueError, AttributeError):
        return True
    return known != 0 or bool((pages & 1).all())


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class OutputFile:
    """A new file of a size known beforehand, written from any number of threads.

    Args:
        path: must not exist.
        size: bytes of the whole file.
        reserve: reserve all blocks, so that a full disk shows at once; otherwise only the size is set.

    Raises:
        OSError: the file exists, the disk is full, ...
    """

    def __init__(self, path: Path, size: int, reserve: bool = True) -> None:
        self.path = path
        self.ordinary = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.descriptors = [self.ordinary]
        self.direct: int | None = None
        try:
            if reserve:
                _reserve(self.ordinary, size)
            else:
                os.ftruncate(self.ordinary, size)
        except BaseException:
            self.close()
            raise
        if mmap.PAGESIZE <= ALIGNMENT:  # in larger pages, blocks written directly would meet others written the ordinary way
            with suppress(OSError):  # a file system without direct writes
                self.direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
                self.descriptors.append(self.direct)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`; whole blocks go directly when `data` begins at a page of memory and `offset` at a block."""
        whole = 0 if self.direct is None or offset % ALIGNMENT else len(data) // ALIGNMENT * ALIGNMENT
        done = self._write_direct(data[:whole], offset) if whole else 0
        write_all(self.ordinary, data[done:], offset + done)

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Write whole blocks directly; returns how many bytes, 0 when the file system refuses."""
        done = 0
        try:
            while done < len(data) and (descriptor := self.direct) is not None:
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # Larger blocks than ours, memory that is not aligned, or a file system that only pretended: never asked again.
            # The descriptor stays open until the file is closed, since other threads may be writing through it.
            self.direct = None
        return done

    def clone(self, source: int, offset: int, size: int) -> bool:
        """Let `size` bytes at `offset` share the blocks of those at `source`; False when that is not possible."""
        if any(value % ALIGNMENT for value in (source, offset, size)):
            return False
        return _clone(self.ordinary, source, offset, size)

    def sync(self) -> None:
        """Make every byte durable."""
        os.fsync(self.ordinary)

    def close(self) -> None:
        """Close the file; what was written stays."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def can_clone(folder: Path) -> bool:
    """Whether files in `folder` can share blocks inside themselves; a small file is written and removed to find out."""
    path = folder / f".reflink.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return False
    try:
        write_all(descriptor, bytes(ALIGNMENT), 0)
        os.ftruncate(descriptor, 2 * ALIGNMENT)
        return _clone(descriptor, 0, ALIGNMENT, ALIGNMENT)
    except OSError:
        return False
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _clone(descriptor: int, source: int, offset: int, size: int) -> bool:
    try:
        fcntl.ioctl(descriptor, FICLONERANGE, struct.pack("qQQQ", descriptor, source, size, offset))
    except OSError:
        return False  # writing, which comes next, finds out whether the reason is one to stop for
    return True


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file; where the file system cannot, only set its size.

    `posix_fallocate` is no substitute: without support of the file system it writes every block.
    """
    reserve = getattr(_libc(), "fallocate", None)
    if reserve is not None:
        if reserve(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)
