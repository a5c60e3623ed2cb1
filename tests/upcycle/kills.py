"""Processes that write a child together with those that come after them, and are killed."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Begin = Callable[[Path, bool], "subprocess.Popen[str]"]
"""Starts a process that writes a target, with or without `resume`."""


def partial_of(target: Path) -> Path:
    """The working folder of an expansion."""
    return target.with_name(f".{target.name}.expanding")


def work_of(target: Path) -> Path:
    """The folder in it that has the shards and what is known of them; one that does not exist before it is begun."""
    return next(partial_of(target).glob("work.*"), partial_of(target) / "work.none")


def finished(target: Path) -> int:
    """Shards of an unfinished expansion that are done."""
    with suppress(FileNotFoundError):  # not begun, or published
        return sum(name.endswith(".json") and not name.startswith(".") for name in os.listdir(work_of(target) / "manifests"))
    return 0


def kill_and_resume(begin: Begin, target: Path, shards: int, kills: int, moment: random.Random) -> int:
    """Write a child, killing a process at a random moment of its work until `kills` of them have died; returns how many have.

    That is less where a process was quicker than the blow. Moments are counted in shards, and so do not depend on the machine.
    """
    died = 0
    while not target.exists():
        process = begin(target, partial_of(target).exists())
        if died < kills:
            due = moment.randint(finished(target), shards)
            while process.poll() is None and not target.exists() and finished(target) < due:
                time.sleep(0.001)
            while process.poll() is None and not target.exists() and not partial_of(target).exists():
                time.sleep(0.001)
            time.sleep(moment.uniform(0.0, 0.02))
            died += process.poll() is None
            process.kill()
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), said
    process = begin(target, True)  # the last one may have been killed between the renaming and its end
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return died
