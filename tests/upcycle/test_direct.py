"""Reading and writing past the page cache gives the bytes that ordinary access gives, wherever it works and where it does not."""

import errno
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import EnvironmentFailure
from moexpand.upcycle.direct import MARGIN, InputFile, OutputFile, aligned_buffer, can_clone
from moexpand.upcycle.probe import write_speed
from moexpand.upcycle.writer import expand
from tests.upcycle.expanding import hashes, recipe_of, write_parent

SIZE = 100_000
CONTENT = np.random.default_rng(0).integers(0, 256, size=SIZE, dtype=np.uint8).tobytes()


@contextmanager
def new_file() -> Iterator[Path]:
    """A path on the disk of the temporary folder; hypothesis calls a test many times with one fixture."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def write_in_ranges(file: OutputFile, cuts: list[int]) -> None:
    """Write CONTENT in the ranges between `cuts`, the last one first, each from the head of an aligned buffer."""
    buffer = aligned_buffer(1 << 17)
    edges = sorted({0, SIZE, *cuts})
    for begin, end in reversed(list(pairwise(edges))):
        buffer[: end - begin] = CONTENT[begin:end]
        file.write(buffer[: end - begin], begin)
    file.sync()
    file.close()


cuts = st.lists(st.one_of(st.integers(0, SIZE), st.integers(0, SIZE // 4096).map(lambda block: block * 4096)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(cuts=cuts, reserve=st.booleans())
def test_any_ranges_in_any_order_make_the_file(cuts: list[int], reserve: bool) -> None:
    with new_file() as path:
        write_in_ranges(OutputFile(path, SIZE, reserve), cuts)
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    file = OutputFile(tmp_path / "file", SIZE)
    file.direct = file.direct or os.dup(file.ordinary)
    direct, real, refused = file.direct, os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor == direct:
            refused.append(offset)
            raise OSError(code, "no")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_in_ranges(file, [4096, 8192, 40960])
    assert len(refused) == 1  # asked once
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_disk_that_fails_is_not_taken_for_one_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = OutputFile(tmp_path / "file", SIZE)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="broken"):
        file.write(aligned_buffer(8192), 0)
    file.close()


def test_space_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    reserved, sparse = (OutputFile(tmp_path / name, 1 << 20, reserve) for name, reserve in (("a", True), ("b", False)))
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size == 1 << 20
    assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20
    assert (tmp_path / "b").stat().st_blocks == 0
    for file in (reserved, sparse):
        file.close()


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, SIZE), size=st.integers(0, SIZE), cached=st.booleans())
def test_any_range_is_read_from_disk_or_cache(start: int, size: int, cached: bool) -> None:
    size = min(size, SIZE - start)
    with new_file() as path:
        path.write_bytes(CONTENT)
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        if not cached:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        file = InputFile(path)
        assert file.read(aligned_buffer(SIZE + MARGIN), start, size) == CONTENT[start : start + size]
        file.close()


def test_a_file_system_that_refuses_direct_reads_gets_ordinary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    file = InputFile(tmp_path / "file")
    file.direct = file.direct or os.dup(file.ordinary)
    direct, real = file.direct, os.preadv
    monkeypatch.setattr("moexpand.upcycle.direct._resident", lambda *range: False)

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor == direct:
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert file.read(aligned_buffer(SIZE + MARGIN), 5000, 70_000) == CONTENT[5000:75_000]
    assert file.direct is None


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    file = InputFile(tmp_path / "file")
    monkeypatch.setattr("moexpand.upcycle.direct._resident", lambda *range: cached)
    with pytest.raises(EnvironmentFailure, match=r"file holds nothing at byte 100,000 any more"):
        file.read(aligned_buffer(SIZE + MARGIN), 99_000, 2000)
    file.close()


def test_the_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    assert write_speed(tmp_path / "not yet" / "child", largest=8 << 20) > 1e6
    assert list(tmp_path.iterdir()) == []


def test_the_probe_of_a_disk_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("moexpand.upcycle.direct.os.open", refuse)
    with pytest.raises(EnvironmentFailure, match="Read-only file system while probing the disk"):
        write_speed(tmp_path / "child")


def test_a_file_system_without_reflinks_is_written_to_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not can_clone(tmp_path)
    assert list(tmp_path.iterdir()) == []
    summary = expand(recipe_of(write_parent(tmp_path / "parent", layers=1)), tmp_path / "child", reflink="auto")
    assert summary.shared == 0


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with reflinks, in a file; needs root, loop devices and xfsprogs."""
    image, folder = tmp_path / "image", tmp_path / "xfs"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.extras
def test_reflinks_share_the_blocks_of_equal_experts(tmp_path: Path, xfs: Path) -> None:
    parent = write_parent(tmp_path / "parent", hidden=512, intermediate=512)
    assert can_clone(xfs)
    before = os.statvfs(xfs).f_bfree
    summary = expand(recipe_of(parent), xfs / "child", reflink="auto", workers=2)
    used = (before - os.statvfs(xfs).f_bfree) * os.statvfs(xfs).f_frsize
    expand(recipe_of(parent), tmp_path / "child", reflink="never")
    assert hashes(xfs / "child") == hashes(tmp_path / "child")
    size = sum(file.stat().st_size for file in (xfs / "child").iterdir())
    assert summary.shared > 0.7 * size
    assert used < 0.35 * size
    assert expand(recipe_of(parent), xfs / "again", reflink="never").shared == 0


@pytest.mark.extras
def test_reflinks_need_no_space_for_what_they_share(tmp_path: Path, xfs: Path) -> None:
    parent = write_parent(tmp_path / "parent", hidden=512, intermediate=512)
    size = sum(file.stat().st_size for file in parent.iterdir())
    with open(xfs / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(xfs).f_bavail * os.statvfs(xfs).f_frsize - 2 * size)
    with pytest.raises(EnvironmentFailure, match="needs"):
        expand(recipe_of(parent), xfs / "child", reflink="never")
    summary = expand(recipe_of(parent), xfs / "child", reflink="auto")
    assert summary.shared > 2 * size
