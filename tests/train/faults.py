"""Runs of the real command that are made to fail, and what the tests compare of them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.commands import ROOT
from tests.train.conftest import settings

FAILPOINTS = "MOEXPAND_FAILPOINTS"


def begin(words: list[str], failpoints: str = "", module: str = "moexpand") -> subprocess.Popen[str]:
    """Start a `train` command with failpoints, and leave it running."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", FAILPOINTS)}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"} | ({FAILPOINTS: failpoints} if failpoints else {})
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def train(words: list[str], failpoints: str = "", timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a `train` command with failpoints to its end."""
    process = begin(words, failpoints)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def short(shards: Path, run: Path, **changes: object) -> list[str]:
    """A run of twelve steps on two ranks that saves every five steps; see `settings`."""
    return settings(shards, run, **{"parallel__timeout_seconds": 60, "watchdog__seconds": 30, **changes})


def digest(folder: Path) -> str:
    """SHA-256 over all weights and moments of a checkpoint, read by torch's own reader."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    table = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: each for name, each in table.items() if isinstance(each, TensorStorageMetadata)}
    state: dict[str, Any] = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode() + state[name].numpy().tobytes())
    return sha.hexdigest()


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    """What must be the same to the last bit in a run that was interrupted."""
    return [tuple(row[name] for name in ("step", "tokens", "loss", "grad_norm", "lr", "moe/load_cv")) for row in rows(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def leftovers(run: Path) -> list[str]:
    """What an interrupted save leaves: hidden folders and files."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("."))
