"""The launcher of one node of a job: meets the other nodes, then runs this one's workers.

    python -m moexpand.launch.node --run RUN --nodes N --processes P --job ID            under srun, which tells the node's number
    python -m moexpand.launch.node ... --node 0 --endpoint HEAD:PORT                     by hand

Under srun the nodes meet through files in the run folder, RUN/.nodes/ID/: each says that it is there, and the head then names
the port where the workers meet. A node that does not come, or cannot see the run folder or reach the head, is named within the
patience, and no node ever goes on as a world of its own.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import moexpand
from moexpand.base.errors import ENVIRONMENT, EnvironmentFailure, InputError, MoexpandError
from moexpand.base.files import disk_errors, write_atomic
from moexpand.base.result import remove_result
from moexpand.launch.local import run_workers, stop_before_workers
from moexpand.launch.torchrun import LAUNCHED, WORKER, Node, worker_arguments

MEETINGS = ".nodes"
POLL_SECONDS = 0.2
ECHO_SECONDS = 10.0
"""SLURM sends a signal to every process of a step, and srun passes on what it gets: one request arrives several times."""


@dataclass(frozen=True)
class Place:
    """What a node knows of itself: its number, the name under which others reach it, and how many there are."""

    number: int
    name: str
    count: int


def main(words: list[str]) -> int:
    """Run this node's workers; returns the code of the run."""
    arguments = _parser().parse_args(words)
    stop_before_workers()
    try:
        return run(arguments, os.environ)
    except MoexpandError as error:
        print(f"moexpand: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        print(f"moexpand: {socket.gethostname()} failed with {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return ENVIRONMENT


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Meet the others and run the workers."""
    place = place_of(arguments, environment)
    folder = Path(arguments.run)
    if not (folder / LAUNCHED).is_file():
        raise EnvironmentFailure(
            f"Node {place.number} ({place.name}) does not see {folder / LAUNCHED}; run.dir must be on a file system that all "
            "nodes share."
        )
    endpoint = arguments.endpoint or meet(folder / MEETINGS, arguments.job, place, arguments.patience)
    check_reachable(endpoint, place)
    if not place.number:
        check_free(endpoint)
    node = Node(place.number, place.count, endpoint, place.name, arguments.job, arguments.patience)
    log = folder / ("launch.log" if not place.number else f"launch.node_{place.number:05}.log")
    try:
        return run_workers(
            WORKER,
            worker_arguments(folder),
            arguments.processes,
            log=log,
            result=folder,
            grace_seconds=arguments.grace,
            node=node,
            echo_seconds=ECHO_SECONDS,
        )
    finally:
        if not place.number:
            shutil.rmtree(folder / MEETINGS, ignore_errors=True)


def place_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """Where this node stands.

    Raises:
        InputError: neither srun nor `--node` says so, or SLURM started another number of nodes than the run needs.
    """
    host = socket.gethostname()
    if arguments.node is not None:
        if not 0 <= arguments.node < arguments.nodes:
            raise InputError(f"--node {arguments.node} is none of the {arguments.nodes} nodes, which are numbered from 0.")
        return Place(arguments.node, host, arguments.nodes)
    try:
        number, started = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    except (KeyError, ValueError):
        raise InputError("Neither srun nor --node tells which node this is; start this through the batch script.") from None
    if started != arguments.nodes:
        raise InputError(f"srun started {started} nodes and the run needs {arguments.nodes}; submit the script as it is.")
    return Place(number, environment.get("SLURMD_NODENAME", host), arguments.nodes)


def meet(meetings: Path, job: str, place: Place, patience: float) -> str:
    """Wait until all nodes are there.

    Args:
        meetings: folder in the run folder.
        job: the same on all nodes, new in every start.
        place: this node.
        patience: longest wait, in seconds.

    Returns:
        HOST:PORT of the head, the same on all nodes.

    Raises:
        EnvironmentFailure: a node did not come in time, or has another version of moexpand.
    """
    folder = meetings / job
    with disk_errors(f"meeting the other nodes in {folder}"):
        if not place.number:
            remove_result(meetings.parent)
            for left in meetings.glob("*"):
                if left != folder:
                    shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mine = {"name": place.name, "version": moexpand.__version__}
        write_atomic(folder / f"node_{place.number:05}.json", json.dumps(mine))
        return _gather(folder, place, patience) if not place.number else _await_head(folder, place, patience)


def _gather(folder: Path, place: Place, patience: float) -> str:
    """On the head: wait for everyone, then name a port."""
    end = time.monotonic() + patience
    while missing := [number for number in range(place.count) if not (folder / f"node_{number:05}.json").is_file()]:
        if time.monotonic() > end:
            raise EnvironmentFailure(
                f"{_nodes(missing)} of {place.count} did not come within {patience:.0f} s; look at the job's output, and whether "
                f"all nodes see {folder.parents[1]}."
            )
        time.sleep(POLL_SECONDS)
    for number in range(place.count):
        there = json.loads((folder / f"node_{number:05}.json").read_text(encoding="utf-8"))
        if there["version"] != moexpand.__version__:
            raise EnvironmentFailure(
                f"Node {number} ({there['name']}) has moexpand {there['version']} and the head {moexpand.__version__}; install "
                "the same version on all nodes."
            )
    endpoint = f"{place.name}:{_free_port()}"
    write_atomic(folder / "endpoint", endpoint)
    return endpoint


def _await_head(folder: Path, place: Place, patience: float) -> str:
    """On the other nodes: wait for the head's word. It may need its own patience for the others first."""
    end = time.monotonic() + 2 * patience
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            return (folder / "endpoint").read_text(encoding="utf-8")
        time.sleep(POLL_SECONDS)
    raise EnvironmentFailure(
        f"Node {place.number} ({place.name}) waited {2 * patience:.0f} s for the head node to begin; look at its part of the "
        f"output, and whether both see {folder.parents[1]}."
    )


def check_reachable(endpoint: str, place: Place) -> None:
    """Look up the head's name and this node's own, under which its peers will reach it.

    Raises:
        EnvironmentFailure: a name that does not resolve here.
    """
    for name in (endpoint.rpartition(":")[0], place.name):
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            raise EnvironmentFailure(
                f"Node {place.number} ({place.name}) cannot resolve {name}; add it to the name service or to /etc/hosts."
            ) from None


def check_free(endpoint: str) -> None:
    """Look whether the port where the nodes are to meet can be taken, on the head.

    Raises:
        EnvironmentFailure: another process has it.
    """
    port = int(endpoint.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise EnvironmentFailure(f"Port {port} of the head cannot be taken ({error.strerror}); give another one.") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _nodes(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"Node {named}" if len(numbers) == 1 else f"Nodes {named}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moexpand.launch.node", description="The launcher of one node of a job.")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job")
    parser.add_argument("--processes", type=int, required=True, help="workers on each node")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds that workers get to save after a signal")
    parser.add_argument("--patience", type=float, default=300.0, help="longest wait for the other nodes, in seconds")
    parser.add_argument("--job", required=True, help="name of this start, the same on all nodes")
    parser.add_argument("--node", type=int, help="this node's number, where srun does not tell")
    parser.add_argument("--endpoint", help="HOST:PORT of the head, where the nodes do not meet through the run folder")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
