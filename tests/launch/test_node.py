"""Nodes of one job: they meet, a missing or unequal one is named in time, and none goes on as a world of its own."""

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.result import read_result, write_result
from moexpand.launch import node
from moexpand.launch.node import Place, check_reachable, meet, place_of
from moexpand.launch.torchrun import Node, command_line
from tests.commands import ROOT


def arguments(**changes: object) -> argparse.Namespace:
    words = ["--run", "/runs/one", "--nodes", "2", "--processes", "1", "--job", "41.0.1"]
    given = node._parser().parse_args(words)
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def test_srun_tells_the_place() -> None:
    environment = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURMD_NODENAME": "n07"}
    assert place_of(arguments(), environment) == Place(1, "n07", 2)
    assert place_of(arguments(node=0), {}).number == 0


@pytest.mark.parametrize(
    ("given", "environment", "told"),
    [
        ({}, {}, "Neither srun nor --node"),
        ({}, {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1"}, "srun started 1 nodes and the run needs 2"),
        ({"node": 2}, {}, "--node 2 is none of the 2 nodes"),
    ],
)
def test_a_place_that_is_not_known_is_refused(given: dict[str, int], environment: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        place_of(arguments(**given), environment)


def test_all_nodes_get_the_heads_word_and_the_old_result_is_gone(tmp_path: Path) -> None:
    write_result(tmp_path, 3, "An older start failed.")
    (tmp_path / ".nodes" / "older").mkdir(parents=True)
    heard: dict[int, str] = {}

    def come(number: int) -> None:
        heard[number] = meet(tmp_path / ".nodes", "41.0.1", Place(number, f"n{number}", 3), 20.0)

    threads = [threading.Thread(target=come, args=(number,)) for number in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert len(set(heard.values())) == 1
    host, port = heard[0].split(":")
    assert host == "n0"
    assert int(port) > 0
    assert read_result(tmp_path) is None
    assert [each.name for each in (tmp_path / ".nodes").iterdir()] == ["41.0.1"]


def test_a_node_that_does_not_come_is_named_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match=r"Nodes 1, 2 of 3 did not come within 1 s"):
        meet(tmp_path / ".nodes", "a", Place(0, "n0", 3), 1.0)
    with pytest.raises(EnvironmentFailure, match=r"Node 1 \(n1\) waited 1 s for the head node"):
        meet(tmp_path / ".nodes", "b", Place(1, "n1", 3), 0.5)
    assert time.monotonic() - start < 10


def test_nodes_with_another_version_are_named(tmp_path: Path) -> None:
    folder = tmp_path / ".nodes" / "a"
    folder.mkdir(parents=True)
    (folder / "node_00001.json").write_text(json.dumps({"name": "n1", "version": "0.0.1"}))
    with pytest.raises(EnvironmentFailure, match=r"Node 1 \(n1\) has moexpand 0\.0\.1"):
        meet(tmp_path / ".nodes", "a", Place(0, "n0", 2), 5.0)


def test_names_that_do_not_resolve_are_told() -> None:
    with pytest.raises(EnvironmentFailure, match=r"Node 1 \(localhost\) cannot resolve no-such-host\.invalid"):
        check_reachable("no-such-host.invalid:29500", Place(1, "localhost", 2))
    check_reachable("127.0.0.1:29500", Place(1, "localhost", 2))


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(EnvironmentFailure, match=rf"Port {port} of the head cannot be taken \(Address already in use\)"):
            node.check_free(f"localhost:{port}")
    node.check_free(f"localhost:{port}")


def test_a_run_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    words = ["--run", str(tmp_path), "--nodes", "2", "--processes", "1", "--job", "a", "--node", "1", "--endpoint", "localhost:1"]
    done = subprocess.run(
        [sys.executable, "-m", "moexpand.launch.node", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert "does not see" in done.stderr
    assert "file system that all nodes share" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ranks_are_numbered_as_the_nodes_and_only_rank_0_is_heard() -> None:
    head = command_line("m", [], 2, "logs", Node(0, 2, "n0:29500", "n0", "41"))
    other = command_line("m", [], 2, "logs", Node(1, 2, "n0:29500", "n1", "41"))
    assert "--redirects=1:1" in head
    assert "--redirects=0:1,1:1" in other
    assert {"--node-rank=1", "--master-addr=n0", "--master-port=29500", "--local-addr=n1", "--rdzv-id=41"} < set(other)
