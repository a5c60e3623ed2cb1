"""torchrun's command line and environment for one node of a job."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import moexpand
from moexpand.launch.agent import ENDS


@dataclass(frozen=True)
class Node:
    """A machine's place in a job.

    Attributes:
        number: 0 is the head, whose first worker is rank 0.
        count: nodes of the job.
        endpoint: HOST:PORT of the head, where the workers of several nodes meet.
        address: name under which the others reach this node.
        job: the same on all nodes and different in every start.
        patience: longest wait for the other nodes, in seconds.
    """

    number: int = 0
    count: int = 1
    endpoint: str = ""
    address: str = "127.0.0.1"
    job: str = ""
    patience: float = 600.0


ALONE = Node()

WORKER = "moexpand.train"
LAUNCHED = "launch.yaml"
"""In the run folder: the configuration of the workers."""


def worker_arguments(run: Path) -> list[str]:
    """Arguments of the training workers of a run."""
    return ["--config-dir", str(run), "--config-name", LAUNCHED]


def command_line(module: str, arguments: list[str], processes: int, logs: str = "", node: Node = ALONE) -> list[str]:
    """The torchrun command for the workers of one node.

    Args:
        module: the workers' module, run with `-m`.
        arguments: its arguments.
        processes: how many workers on each node.
        logs: folder for the standard output of all workers but rank 0; without it they write to the same one as rank 0.
        node: this machine's place; alone by default.
    """
    quiet = [rank for rank in range(processes) if rank or node.number]
    return [
        *(sys.executable, "-m", "moexpand.launch.agent"),
        *(f"--nnodes={node.count}", f"--nproc-per-node={processes}", "--max-restarts=0", f"--signals-to-handle={ENDS.name}"),
        *_meeting(node),
        *([f"--log-dir={logs}", f"--redirects={','.join(f'{rank}:1' for rank in quiet)}"] if logs and quiet else []),
        *("-m", module, *arguments),
    ]


def _meeting(node: Node) -> list[str]:
    """How the nodes find each other."""
    if not node.endpoint:
        # Port 0 lets the rendezvous take a free one; the address keeps host names that do not resolve out of it.
        return ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    host, _, port = node.endpoint.rpartition(":")
    # The static one numbers ranks as the nodes are numbered; torchrun's c10d sorts them by address.
    return [
        *("--rdzv-backend=static", f"--rdzv-id={node.job}", f"--node-rank={node.number}"),
        f"--rdzv-conf=timeout={int(node.patience)}",
        *(f"--master-addr={host}", f"--master-port={port}", f"--local-addr={node.address}"),
    ]


def environment(processes: int) -> dict[str, str]:
    """Our environment, with the cores shared out and this package importable from any folder."""
    package = str(Path(moexpand.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": os.pathsep.join([*paths, package])}
