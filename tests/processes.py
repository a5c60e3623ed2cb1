"""Run a function on N gloo ranks on this machine and bring back what each returned, or the first failure."""

import os
import queue
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any
from unittest import mock


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, so that none of them takes it between two uses."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@cache
def _context() -> ForkServerContext | SpawnContext:
    """Starts a process that imports what all ranks need, which takes seconds, and does nothing else; ranks are forked from it.

    So ranks share its hash seed and environment; the tests of whole commands start theirs as torchrun does.
    """
    if len(tempfile.gettempdir()) > 60:  # it listens at a path there of at most 107 characters
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["moexpand.parallel.engine"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when the libraries are loaded
        forkserver.ensure_running()
    return context


def _worker(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, size: int, port: int, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import torch

        torch.set_num_threads(1)
        results.put((rank, True, function(*arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_on_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*arguments)` in `size` processes of their own, joined by torchrun's environment variables.

    `function` and its arguments and results must be picklable. All processes are gone when this returns.
    """
    context = _context()
    results: Any = context.Queue()
    port = free_port()
    workers = [context.Process(target=_worker, args=(function, arguments, rank, size, port, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(answers) < size:
            try:
                rank, succeeded, answer = results.get(timeout=1.0)
            except queue.Empty:
                silent = [
                    worker.pid for rank, worker in enumerate(workers) if rank not in answers and worker.exitcode not in (None, 0)
                ]
                assert not silent, f"ranks died without an answer: {silent}"
                assert time.monotonic() < deadline, f"only ranks {sorted(answers)} of {size} answered within {timeout} s"
                continue
            assert succeeded, f"rank {rank} failed:\n{answer}"
            answers[rank] = answer
    finally:
        for worker in workers:
            if len(answers) < size:
                worker.kill()
            worker.join(10)
    return [answers[rank] for rank in range(size)]
