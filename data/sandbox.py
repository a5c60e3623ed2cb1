"""Run jobs on untrusted files in processes of their own, with a limit on time and memory. A job that dies takes nothing along."""

import errno
import multiprocessing
import multiprocessing.connection
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from typing import Any

from moexpand.base.errors import EnvironmentFailure

MEMORY_BYTES = 1536 << 20
"""Address space of a job."""
FILE_BYTES = 1 << 30
"""Largest file that a job may write."""
OUT_OF_MEMORY = 83
"""Exit code of a job that ran into its limit and could still say so."""
DISK_FULL = 84
"""Exit code of a job that could not write its result: not the fault of its input."""


def run_jobs(
    function: Callable[..., None],
    jobs: list[tuple[Any, ...]],
    workers: int,
    seconds: float,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[tuple[int, str | None]]:
    """Run `function(*job)` for every job, each in a fresh process, at most `workers` at a time.

    Args:
        function: importable by name; hands its result over as files.
        jobs: its arguments, which must be picklable.
        workers: processes at a time.
        seconds: wall-clock limit of one job; it is killed when it passes it.
        memory_bytes: address space of one job.

    Yields:
        The number of a job and None, or the reason why it failed: `time_limit`, `memory_limit` or `crashed`. In the order in
        which jobs end. Processes still running are killed when the caller stops early.

    Raises:
        EnvironmentFailure: a job found the disk full.
    """
    # A fresh interpreter, not a fork: the parent may have threads, and a job should not inherit its memory.
    context = multiprocessing.get_context("spawn")
    running: dict[int, tuple[SpawnProcess, float]] = {}
    waiting = iter(range(len(jobs)))
    try:
        while True:
            while len(running) < workers and (number := next(waiting, None)) is not None:
                process = context.Process(target=_limited, args=(function, jobs[number], seconds, memory_bytes), daemon=True)
                process.start()
                running[number] = (process, time.monotonic() + seconds)
            if not running:
                return
            deadline = min(deadline for _, deadline in running.values())
            sentinels = [process.sentinel for process, _ in running.values()]
            multiprocessing.connection.wait(sentinels, timeout=max(deadline - time.monotonic(), 0.0))
            now = time.monotonic()
            for number, (process, deadline) in list(running.items()):
                if process.is_alive() and now < deadline:
                    continue
                late = process.is_alive()
                if late:
                    process.kill()
                process.join()
                del running[number]
                if process.exitcode == DISK_FULL:
                    raise EnvironmentFailure("The disk is full while jobs write their results; free some space and start again.")
                yield number, "time_limit" if late else _verdict(process.exitcode)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _verdict(exit_code: int | None) -> str | None:
    if exit_code == 0:
        return None
    return "memory_limit" if exit_code == OUT_OF_MEMORY else "crashed"


def _limited(function: Callable[..., None], job: tuple[Any, ...], seconds: float, memory_bytes: int) -> None:
    """Body of a job's process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    # Ends the job even when its parent has died and nobody watches the clock.
    cpu = int(seconds) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    try:
        function(*job)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    except OSError as error:
        sys.exit(DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{job[:1]}: {error}")
    except Exception as error:
        sys.exit(f"{job[:1]}: {type(error).__name__}: {error}")
