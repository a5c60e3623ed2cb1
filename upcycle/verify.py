"""Prove that a child is what its plan makes of its parent: every byte, every name, every file.

Both folders are streamed: each tensor of the parent is read once and compared with all its copies, a piece at a time.
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import CheckFailed, InputError
from moexpand.base.files import disk_errors, read_json, sha256
from moexpand.upcycle.checkpoint import CONFIG, EXPANSION, Checkpoint, open_checkpoint, read_into
from moexpand.upcycle.config_json import grouped_config
from moexpand.upcycle.model_code import code_files
from moexpand.upcycle.plan import Plan, Recipe, fingerprint, make_plan, recipes
from moexpand.upcycle.safetensors_file import TensorInfo
from moexpand.upcycle.writer import CHECKSUM, PIECE, Progress, copies_by_source, gather_rows, run_jobs

NAMED = 5
"""How many differences an error names before it only counts."""


@dataclass
class Findings:
    """Differences found so far; threads add to it."""

    lines: list[str] = field(default_factory=list)

    def raise_any(self) -> None:
        """Raise a `CheckFailed` that names the first differences, when there are any."""
        if self.lines:
            more = f" (and {len(self.lines) - NAMED} more)" if len(self.lines) > NAMED else ""
            raise CheckFailed("; ".join(sorted(self.lines)[:NAMED]) + more + ".")


@dataclass(frozen=True)
class Proof:
    """What was compared."""

    tensors: int
    nbytes: int


def verify(source: Path, target: Path, workers: int = 0, progress: Progress = lambda compared: None) -> Proof:
    """Prove that every tensor and file of the child `target` equals its recipe.

    Args:
        progress: told how many bytes of the child were compared since its last call, from several threads.

    Raises:
        CheckFailed: something differs; the message names the tensors or files.
        InputError: a folder does not exist, the parent is damaged, or the target was not written by an expansion.
    """
    parent = open_checkpoint(source)
    if not (Path(target) / EXPANSION).is_file():
        raise InputError(f"{target} holds no {EXPANSION}; it is no folder that an expansion wrote.")
    try:
        child = open_checkpoint(target)
        expansion = read_expansion(child.folder)
        recipe = recipes(parent.architecture, expansion.plan)
    except InputError as error:
        raise CheckFailed(str(error)) from None
    _check_structure(parent, child, expansion, recipe)
    checksums, findings = expansion.checksums, Findings()
    buffers = threading.local()
    jobs: list[Callable[[], None]] = [
        partial(
            _compare_copies, parent.info(name), [child.tensors[copy] for copy in copies], checksums, findings, buffers, progress
        )
        for name, copies in copies_by_source(recipe).items()
    ]
    jobs += [
        partial(_compare_rows, parent, child, name, how, checksums, findings, progress)
        for name, how in recipe.items()
        if how.rows is not None
    ]
    run_jobs(jobs, workers)
    findings.raise_any()
    return Proof(len(child.tensors), child.nbytes)


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's shards."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@dataclass(frozen=True)
class Expansion:
    """expansion.json: the plan, and SHA-256 checksums of tensors and model code by name."""

    plan: Plan
    checksums: dict[str, str]
    code: dict[str, str]


def read_expansion(folder: Path) -> Expansion:
    """Read the expansion.json of a child.

    Raises:
        InputError: the file is missing, or is not what an expansion writes.
    """
    file = folder / EXPANSION
    record: Any = read_json(file)
    if not isinstance(record, dict) or record.get("checksum_algorithm") != CHECKSUM:
        raise InputError(f"{file} holds no {CHECKSUM} checksums.")
    tensors, code = record.get("checksums"), record.get("checksums_of_model_code")
    if not isinstance(tensors, dict) or not isinstance(code, dict):
        raise InputError(f"{file} holds no checksums by name.")
    plan = {key: value for key, value in record.items() if not key.startswith("checksum")}
    return Expansion(Plan.from_json(plan, str(file)), tensors, code)


def _check_structure(parent: Checkpoint, child: Checkpoint, expansion: Expansion, recipe: dict[str, Recipe]) -> None:
    """Everything but the tensors' bytes."""
    _check_plan(parent, child, expansion.plan)
    for name, info in child.tensors.items():
        if name not in expansion.checksums:
            raise CheckFailed(f"{child.folder / EXPANSION} has no checksum for {name}.")
        if info.dtype != parent.tensors[recipe[name].source].dtype:
            raise CheckFailed(f"{info.file}: {name} is stored as {info.dtype}, the parent's {recipe[name].source} is not.")
    for name in expansion.checksums:
        if name not in child.tensors:
            raise CheckFailed(f"{child.folder / EXPANSION} has a checksum for {name}, which is no tensor of the child.")
    _check_files(parent, child, expansion.code)


def _check_plan(parent: Checkpoint, child: Checkpoint, plan: Plan) -> None:
    """Parent, config and map are those that the plan's own words call for."""
    if plan.parent != fingerprint(parent):
        raise CheckFailed(f"{child.folder} was made from another parent than {parent.folder}: the fingerprints differ.")
    due = grouped_config(parent.config, plan.num_experts, plan.num_groups)
    for key in sorted(due.keys() | child.config.keys()):
        if key not in due or key not in child.config or due[key] != child.config[key]:
            raise CheckFailed(
                f"{child.folder / CONFIG} has {key}={child.config.get(key)!r}, but {due.get(key)!r} follows from the parent."
            )
    try:
        due_plan = make_plan(
            parent, num_experts=plan.num_experts, num_groups=plan.num_groups, placement=plan.placement, seed=plan.seed
        )
    except InputError as error:
        raise CheckFailed(f"{child.folder / EXPANSION}: {error}") from None
    for layer, (row, due_row) in enumerate(zip(plan.slot_to_parent, due_plan.slot_to_parent, strict=True)):
        for slot, (expert, due_expert) in enumerate(zip(row, due_row, strict=True)):
            if expert != due_expert:
                raise CheckFailed(
                    f"{child.folder / EXPANSION} maps slot {slot} of layer {layer} to expert {expert}, "
                    f"but placement {plan.placement} to {due_expert}."
                )


def _check_files(parent: Checkpoint, child: Checkpoint, code: dict[str, str]) -> None:
    """Side files are the parent's, the model code is the one recorded, and nothing else is there."""
    names = code_files(child.config["model_type"])
    due = {str(file): sha256(parent.folder / file) for file in parent.side_files} | {name: code.get(name, "") for name in names}
    found = {str(file) for file in child.side_files}
    for name in sorted(due.keys() | found):
        if name not in found:
            raise CheckFailed(f"{child.folder / name} is missing.")
        if name not in due:
            raise CheckFailed(f"{child.folder / name} is no file of the parent.")
        if sha256(child.folder / name) != due[name]:
            origin = f"the checksum that {EXPANSION} records" if name in names else f"the parent's {parent.folder / name}"
            raise CheckFailed(f"{child.folder / name} differs from {origin}.")


def _compare_copies(
    source: TensorInfo,
    copies: list[TensorInfo],
    checksums: dict[str, str],
    findings: Findings,
    buffers: threading.local,
    progress: Progress,
) -> None:
    """Compare one tensor of the parent with all its copies, a piece at a time."""
    if not hasattr(buffers, "pair"):
        buffers.pair = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(2)]
    digest = hashlib.sha256()
    different: set[str] = set()
    with ExitStack() as stack:
        source_file, *copy_files = [_open(stack, info) for info in (source, *copies)]
        for begin in range(0, source.nbytes, PIECE):
            ours, theirs = (view[: min(PIECE, source.nbytes - begin)] for view in buffers.pair)
            read_into(source_file, ours, source.start + begin, source.file)
            digest.update(ours)
            for copy, descriptor in zip(copies, copy_files, strict=True):
                read_into(descriptor, theirs, copy.start + begin, copy.file)
                if copy.name not in different and (at := _first_difference(ours, theirs)) is not None:
                    different.add(copy.name)
                    findings.lines.append(f"{copy.name} differs from the parent's {source.name} at its byte {begin + at:,}")
            progress(len(ours) * len(copies))
    for copy in copies:
        if copy.name not in different and checksums[copy.name] != digest.hexdigest():
            findings.lines.append(f"{copy.name} equals its recipe, but {EXPANSION} records another checksum")


def _compare_rows(
    parent: Checkpoint,
    child: Checkpoint,
    name: str,
    recipe: Recipe,
    checksums: dict[str, str],
    findings: Findings,
    progress: Progress,
) -> None:
    """Compare a tensor made of the parent's rows."""
    due = gather_rows(parent, recipe)
    found = np.frombuffer(child.read_bytes(name), dtype=np.uint8).reshape(due.shape)
    wrong = np.flatnonzero((due != found).any(1))
    if wrong.size:
        row = int(wrong[0])
        parent_row = (recipe.rows or ())[row]
        findings.lines.append(
            f"{name} differs in {wrong.size} rows, first in row {row}, which should be row {parent_row} of the parent"
        )
    elif checksums[name] != hashlib.sha256(due.tobytes()).hexdigest():
        findings.lines.append(f"{name} equals its recipe, but {EXPANSION} records another checksum")
    progress(found.nbytes)


def _open(stack: ExitStack, info: TensorInfo) -> int:
    with disk_errors(f"reading {info.file}"):
        descriptor = os.open(info.file, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    return descriptor


def _first_difference(ours: memoryview, theirs: memoryview) -> int | None:
    """Index of the first byte that differs, None when all are equal."""
    left, right = np.frombuffer(ours, dtype=np.uint8), np.frombuffer(theirs, dtype=np.uint8)
    if np.array_equal(left, right):
        return None
    return int(np.flatnonzero(left != right)[0])
