"""One job at a time in a run folder, on any number of hosts that share it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moexpand.base.claims import PATIENCE, REFRESH, Claims
from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors

FOLDER = ".lock"
NAME = "run"

Say = Callable[[str], None]


@contextmanager
def run_lock(run: Path, say: Say = print, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the run folder while the body runs; the process that writes to it does.

    Raises:
        InputError: as `refuse_running`.
    """
    folder = run / FOLDER
    with disk_errors(f"locking {run}"):
        folder.mkdir(parents=True, exist_ok=True)
        claims = Claims(folder, patience)
        _wait_until_free(claims, run, say)
        while claims.take(NAME) is None:  # another one was quicker
            _wait_until_free(claims, run, say)
        for left in folder.iterdir():  # by holders that are gone
            if left != claims.held[NAME][0]:
                with suppress(OSError):
                    left.unlink()
    with claims.refreshed():
        yield


def refuse_running(run: Path, say: Say = print, patience: float = PATIENCE) -> None:
    """Refuse a folder that another job holds.

    A holder that is gone from this host counts no more at once. One of another host may be gone too, as after a failure: it
    is waited for as long as it takes to be sure, `patience` seconds.

    Raises:
        InputError: another job works in the folder; the sentence names its process and host.
    """
    if (run / FOLDER).is_dir():
        with disk_errors(f"looking at {run}"):
            _wait_until_free(Claims(run / FOLDER, patience), run, say)


def _wait_until_free(claims: Claims, run: Path, say: Say) -> None:
    began, told = time.monotonic(), False
    while (holder := claims.live().get(NAME)) is not None:
        if holder.here or (told and time.monotonic() - began > claims.patience + REFRESH):
            raise InputError(f"Another job works in {run}: {holder}; stop it, or choose another run.dir.")
        if not told:
            say(f"waiting up to {claims.patience:.0f} s to see whether {holder} still works in {run}")
            told = True
        time.sleep(min(1.0, claims.patience / 10))
