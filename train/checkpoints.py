"""What a run folder holds of checkpoints: which there are, which are whole, which one a run goes on from.

checkpoints/step_0000100/   Megatron-Core's shards, trainer.json (step, tokens, ...), config.yaml, manifest.json (size and
                            checksum of each file)
checkpoints/latest          the name of the newest one; moves last
"""

import os
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import PARTIAL, disk_errors, fact_of, read_json, sha256
from moexpand.parallel import ranks
from moexpand.train.preflight import CHECKPOINTS as FOLDER

NAME = "step_{:07d}"
LATEST = "latest"
TRAINER = "trainer.json"
MANIFEST = "manifest.json"

KEYS = {"the model's selection_bias": "balance.selection_bias"}
"""Settings that are kept under another name than the key that sets them."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done, skipped ones included.
        tokens: unmasked tokens trained on.
        fixed: settings that must be the same when the run goes on, by key.
        noted: settings that may change but bend the curve, by key.
        wandb_id: identity of the run in W&B.
        bad: of each source, the keys of the unreadable samples that any rank has met, each with what is wrong.
        made_by: versions of moexpand and of what it stands on, and the git revision, for the reader.
        guard: what the guard remembers of the last steps (`guard.History`).
    """

    step: int
    tokens: int
    fixed: dict[str, Any]
    noted: dict[str, Any]
    wandb_id: str
    bad: list[dict[str, str]] = field(default_factory=list)
    made_by: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)


def new_identity() -> str:
    """An identity for a new run, kept in its checkpoints."""
    return uuid.uuid4().hex[:12]


def list_steps(run: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    names = (re.fullmatch(r"step_(\d{7,})", path.name) for path in (run / FOLDER).glob("step_*") if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def find(run: Path, step: int | None = None) -> Path:
    """The folder of a step, or of the newest one; an `InputError` says which steps there are."""
    steps = list_steps(run)
    if not steps:
        raise InputError(f"{run} holds no checkpoint.")
    if step is not None and step not in steps:
        raise InputError(f"{run} holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    return run / FOLDER / NAME.format(steps[-1] if step is None else step)


def damage(folder: Path, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint's files, in one sentence that names the file; None when nothing is.

    Args:
        share: which of the listed files to look at.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError as error:
        return str(error)
    if not isinstance(manifest, dict) or TRAINER not in manifest:
        return f"{folder / MANIFEST} does not list a checkpoint's files."
    for name, facts in list(manifest.items())[share]:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing."
        if path.stat().st_size != facts["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}."
        # Checkpoints of earlier versions have a SHA-256.
        found, due = (sha256(path), facts["sha256"]) if "sha256" in facts else (fact_of(path).xxh3, facts["xxh3"])
        if found != due:
            return f"{path} does not have the checksum that {MANIFEST} gives."
    return None


def choose(run: Path, resume: str, here: ranks.Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what to tell the user about damaged ones. All ranks call this, before any writes.

    Leftovers of interrupted saves are removed, and damaged checkpoints newer than the chosen one are set aside under another
    name, so that they neither count as checkpoints nor push whole ones out.

    Raises:
        InputError: `resume` is `never` and there are checkpoints.
        EnvironmentFailure: `resume` is `exact` and the newest one is damaged, or none is whole.
    """
    steps = ranks.broadcast(list_steps(run))
    if steps and resume == "never":
        raise InputError(
            f"{run} holds a checkpoint of step {steps[-1]} and run.resume=never; choose another run.dir or remove it."
        )
    damaged: dict[Path, str] = {}
    chosen: Path | None = None
    for step in reversed(steps):
        folder = run / FOLDER / NAME.format(step)
        wrong = next(filter(None, ranks.gather(damage(folder, slice(here.world_rank, None, here.world_size)))), None)
        if wrong is None:
            chosen = folder
            break
        if resume == "exact":
            raise EnvironmentFailure(f"The newest checkpoint is damaged and run.resume=exact: {wrong}")
        damaged[folder] = wrong
    if damaged and chosen is None:
        raise EnvironmentFailure(f"Every checkpoint in {run / FOLDER} is damaged; the newest: {next(iter(damaged.values()))}")
    if here.main:
        with disk_errors(f"tidying {run / FOLDER}"):
            for leftover in (run / FOLDER).glob(f".step_*{PARTIAL}"):
                shutil.rmtree(leftover)
            for folder in damaged:
                _set_aside(folder)
    ranks.barrier()
    return chosen, [
        f"WARNING: checkpoint {folder.name} is damaged, passed over and renamed to {_aside(folder).name}: {wrong}"
        for folder, wrong in damaged.items()
    ]


def _aside(folder: Path) -> Path:
    return folder.with_name(f"damaged_{folder.name}")


def _set_aside(folder: Path) -> None:
    shutil.rmtree(_aside(folder), ignore_errors=True)
    os.rename(folder, _aside(folder))


def read_progress(folder: Path) -> Progress:
    """What `save` noted beside the weights."""
    return Progress(**read_json(folder / TRAINER))


def compare(saved: Progress, fixed: dict[str, Any], noted: dict[str, Any], folder: Path) -> list[str]:
    """Refuse to go on when a setting that must stay has changed; tell which of the others have.

    Raises:
        InputError: the sentence names each such setting with both values.
    """
    broken = _differences(saved.fixed, fixed)
    if broken:
        raise InputError(f"{folder} cannot be gone on from: {'; '.join(broken)}; set them back or choose another run.dir.")
    return [f"note: {change}" for change in _differences(saved.noted, noted)]


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{KEYS.get(key, key)} was {saved.get(key)!r} and is {value!r}" for key, value in now.items() if saved.get(key) != value
    ]
