"""How fast a disk takes a child: a short write by the writer's own method, and what follows for the whole."""

import os
import secrets
import time
from contextlib import ExitStack
from pathlib import Path

from moexpand.base.files import PARTIAL, disk_errors
from moexpand.upcycle.direct import OutputFile, aligned_buffer
from moexpand.upcycle.layout import existing_parent

PIECE = 16 << 20
LARGEST = 256 << 20
SECONDS = 1.0


def write_speed(target: Path, largest: int = LARGEST) -> float:
    """Bytes a second that the file system of `target` takes from one thread, synced.

    A temporary file of at most `largest` bytes is written for about a second beside the target and removed.

    Raises:
        EnvironmentFailure: nothing can be written there.
    """
    folder = existing_parent(Path(target).absolute().parent)
    path = folder / f".{Path(target).name}.{secrets.token_hex(4)}{PARTIAL}"
    piece = aligned_buffer(min(PIECE, largest))
    piece[:] = os.urandom(len(piece))
    with disk_errors(f"probing the disk of {folder}"), ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        file = OutputFile(path, largest)
        stack.callback(file.close)
        began = time.monotonic()
        written = 0
        while written + len(piece) <= largest and time.monotonic() - began < SECONDS:
            file.write(piece, written)
            written += len(piece)
        file.sync()
        return written / (time.monotonic() - began)
