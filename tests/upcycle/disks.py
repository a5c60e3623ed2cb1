"""Small and read-only disks: file systems of their own where mounting is permitted, elsewhere folders that behave like them."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """Mount a tmpfs at `folder`; False where that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def disk_of(size: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty disk of `size` bytes: a tmpfs, or a folder that says so and whose writes fail beyond that."""
    folder.mkdir()
    with mounted(folder, f"size={size}") as done:
        if not done:
            real, written = os.pwrite, [0]

            def limited(descriptor: int, data: Any, offset: int) -> int:
                written[0] += len(data)
                if written[0] > size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(descriptor, data, offset)

            monkeypatch.setattr(os, "pwrite", limited)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=size, free=max(0, size - written[0])))
        yield folder


@contextmanager
def read_only_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A read-only disk: a tmpfs, or a folder in which nothing can be made."""
    folder.mkdir()
    with mounted(folder, "ro") as done:
        if not done:
            real_open, real_mkdir = os.open, os.mkdir

            def refuse(path: Any, making: bool = True) -> None:
                if making and str(path).startswith(str(folder)):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

            def open_(path: Any, flags: int, *rest: Any, **words: Any) -> int:
                refuse(path, bool(flags & os.O_CREAT))
                return real_open(path, flags, *rest, **words)

            def mkdir(path: Any, *rest: Any, **words: Any) -> None:
                refuse(path)
                real_mkdir(path, *rest, **words)

            monkeypatch.setattr(os, "open", open_)
            monkeypatch.setattr(os, "mkdir", mkdir)
        yield folder
