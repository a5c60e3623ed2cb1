"""Gloo ranks that do what their argument says and end as workers of a run do: `python -m tests.launch.worker HOW FOLDER`."""

import os
import signal
import sys
import time
from pathlib import Path

from moexpand.base.result import write_result


def stay_deaf(folder: Path) -> None:
    """Say hello and never end, whatever signal comes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    (folder / f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def work(how: str, folder: Path) -> None:
    """Join the group, do as told, leave a result."""
    import torch
    import torch.distributed as dist

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stopped.append(number))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print(f"rank {rank}: the sum is {total.item():.0f}", flush=True)
    if how == "crash" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("crash", "wait"):
        signalled = torch.zeros(1)
        while not signalled.item():
            time.sleep(0.05)
            signalled.fill_(len(stopped))
            dist.all_reduce(signalled)
    code = {"ok": 0, "wrong": 2, "wait": 75}[how]
    message = f"The worker ended with {code} after signals {stopped}." if code else ""
    dist.barrier()
    if rank == 0:
        write_result(folder, code, message)
    dist.destroy_process_group()


if __name__ == "__main__":
    how, folder = sys.argv[1], Path(sys.argv[2])
    stay_deaf(folder) if how == "deaf" else work(how, folder)
