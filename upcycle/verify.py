"""Prove that a child is what its plan makes of its parent: every byte, every name, every file.

Both folders are streamed: what the writer would write is read or made again, once, and compared with all its places, a piece at a
time.
"""

import hashlib
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from moexpand.base.errors import CheckFailed, InputError
from moexpand.base.files import disk_errors, read_json, sha256
from moexpand.upcycle.checkpoint import CONFIG, EXPANSION, INDEX, Checkpoint, open_checkpoint, read_into
from moexpand.upcycle.checksums import CHECKSUM, tensor_checksum
from moexpand.upcycle.crew import PIECE, Progress, run_jobs
from moexpand.upcycle.jobs import Job, Made
from moexpand.upcycle.model_code import code_files
from moexpand.upcycle.plan import Plan
from moexpand.upcycle.planner import check_map
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import METADATA, TensorInfo, read_metadata

TABLES = ("checksums", "checksum_pieces", "checksums_of_model_code", "checksums_of_tokenizer")
"""What expansion.json holds by the names of tensors or files."""

NAMED = 5
"""How many differences an error names before it only counts."""


@dataclass
class Findings:
    """Differences found so far, and digests of what every tensor should be; threads add to both."""

    lines: dict[tuple[str, str], str] = field(default_factory=dict)
    """What differs first in each tensor, and in each slot of a stack."""
    pieces: dict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    """SHA-256 of each piece of each tensor, by its offset."""

    def raise_any(self) -> None:
        """Raise a `CheckFailed` that names the first differences, when there are any."""
        if self.lines:
            more = f" (and {len(self.lines) - NAMED} more)" if len(self.lines) > NAMED else ""
            raise CheckFailed("; ".join(sorted(self.lines.values())[:NAMED]) + more + ".")


@dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        tensors, nbytes: of the child.
        plan: that it follows.
        map_computed: whether the plan's map was computed again; otherwise it was counted from a calibration or a usage file, or
            is a user's own.
    """

    tensors: int
    nbytes: int
    plan: Plan
    map_computed: bool


@dataclass(frozen=True)
class Expansion:
    """What `expansion.json` says."""

    plan: Plan
    plan_checksum: str
    """As recorded."""
    checksums: dict[str, str]
    """By tensor."""
    pieces: dict[str, int]
    """How many pieces the checksum of a tensor is made of, where not one."""
    files: dict[str, str]
    """Of files that are not the parent's: model code, and the tokenizer of a child with a vocabulary of its own."""


def verify(source: Path, target: Path, workers: int = 0, progress: Progress = lambda compared: None) -> Proof:
    """Prove that every tensor and file of the child `target` equals its recipe.

    Args:
        progress: told how many bytes of the child's shards were compared since its last call, from several threads.

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
        recipe = Recipe(parent, expansion.plan, str(child.folder / EXPANSION))
    except InputError as error:
        raise CheckFailed(str(error)) from None
    computed = _check_structure(child, expansion, recipe)
    progress(folder_bytes(child.folder) - child.nbytes)  # the headers
    findings, buffers = Findings(), threading.local()
    jobs: list[Callable[[], None]] = [
        partial(_compare, job, recipe, child, findings, buffers, progress) for bundle in recipe.bundles() for job in bundle.jobs
    ]
    run_jobs(jobs, workers)
    _compare_checksums(findings, expansion)
    findings.raise_any()
    return Proof(len(child.tensors), child.nbytes, expansion.plan, computed)


def _compare_checksums(findings: Findings, expansion: Expansion) -> None:
    """Recorded checksums are those of the tensors."""
    different = {tensor for tensor, _ in findings.lines}
    for name, pieces in findings.pieces.items():
        due = tensor_checksum([pieces[at] for at in sorted(pieces)]), len(pieces)
        if name not in different and due != (expansion.checksums[name], expansion.pieces.get(name, 1)):
            findings.lines[name, ""] = f"{name} equals its recipe, but {EXPANSION} records another checksum"


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's shards, headers included: what `verify` tells its progress of."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def read_expansion(folder: Path) -> Expansion:
    """The record of the expansion that made a child; anything else is an `InputError` that names the file."""
    file = folder / EXPANSION
    record = read_json(file)
    plan = Plan.from_json(record, str(file))
    if record.get("checksum_algorithm") != CHECKSUM:
        raise InputError(f"{file} has checksum_algorithm={record.get('checksum_algorithm')!r}; this program knows {CHECKSUM!r}.")
    for key in TABLES:
        if not isinstance(record.get(key), dict):
            raise InputError(f"{file} has no table {key}; it was changed since it was written.")
    odd = record.keys() - plan.to_json().keys() - {"checksum_of_plan", "checksum_algorithm", *TABLES}
    if odd:
        raise InputError(f"{file} has {min(odd)}, which no expansion writes; it was changed since it was written.")
    checksums, pieces, code, tokenizer = (record[key] for key in TABLES)
    return Expansion(plan, str(record.get("checksum_of_plan")), checksums, pieces, code | tokenizer)


def _check_structure(child: Checkpoint, expansion: Expansion, recipe: Recipe) -> bool:
    """Everything but the tensors' bytes; returns whether the map was computed again."""
    computed = _check_plan(child, expansion, recipe)
    for name, (dtype, shape) in recipe.tensors.items():
        if name not in child.tensors:
            raise CheckFailed(f"{child.folder} has no tensor {name}, which the plan calls for.")
        info = child.tensors[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckFailed(f"{info.file}: {name} is stored as {info.dtype} {list(info.shape)}, not {dtype} {list(shape)}.")
        if name not in expansion.checksums:
            raise CheckFailed(f"{child.folder / EXPANSION} has no checksum for {name}.")
    recorded = expansion.checksums.keys() | expansion.pieces.keys()
    for names, what in ((child.tensors, "holds"), (recorded, f"has a checksum in {EXPANSION} for")):
        for name in names:
            if name not in recipe.tensors:
                raise CheckFailed(f"{child.folder} {what} {name}, which is no tensor of the child.")
    _check_metadata(child)
    _check_files(recipe, child, expansion.files)
    return computed


def _check_plan(child: Checkpoint, expansion: Expansion, recipe: Recipe) -> bool:
    """Config and map are those that the plan's own words call for, and the plan is the one that was written."""
    due = recipe.config
    for key in sorted(due.keys() | child.config.keys()):
        if key not in due or key not in child.config or due[key] != child.config[key]:
            raise CheckFailed(
                f"{child.folder / CONFIG} has {key}={child.config.get(key)!r}, but {due.get(key)!r} follows from the parent."
            )
    try:
        computed = check_map(recipe.parent, recipe.plan, str(child.folder / EXPANSION))
    except InputError as error:
        raise CheckFailed(str(error)) from None
    if recipe.plan.digest != expansion.plan_checksum:
        raise CheckFailed(
            f"{child.folder / EXPANSION} was changed since it was written: its plan has the checksum {recipe.plan.digest}, but "
            f"checksum_of_plan is {expansion.plan_checksum}."
        )
    return computed


def _check_metadata(child: Checkpoint) -> None:
    """What index and headers say besides tensors."""
    for file in sorted({info.file for info in child.tensors.values()}):
        if read_metadata(file) != METADATA:
            raise CheckFailed(f"{file} has other metadata in its header than {METADATA}, which the writer gives it.")
    index = child.folder / INDEX
    if index.is_file():
        found = {key: value for key, value in read_json(index).items() if key != "weight_map"}
        due = {"metadata": {"total_size": child.nbytes}}
        if found != due:
            raise CheckFailed(f"{index} has {found} besides its weight_map, but it should be {due}.")


def _check_files(recipe: Recipe, child: Checkpoint, own: dict[str, str]) -> None:
    """Side files are the parent's, those of the child's own are as recorded, and nothing else is there."""
    code = code_files(child.config["model_type"])
    parent = recipe.parent.folder
    due = {str(file): sha256(parent / file) for file in recipe.kept_side_files} | dict.fromkeys(code, "") | own
    found = {str(file) for file in child.side_files}
    for name in sorted(due.keys() | found):
        if name not in found:
            raise CheckFailed(f"{child.folder / name} is missing{f', which {EXPANSION} names' if name in own else ''}.")
        if name not in due:
            raise CheckFailed(f"{child.folder / name} is no file of the parent.")
        if not due[name]:
            raise CheckFailed(f"{child.folder / EXPANSION} has no checksum for {name}.")
        if sha256(child.folder / name) != due[name]:
            origin = f"the checksum that {EXPANSION} records" if name in own else f"the parent's {parent / name}"
            raise CheckFailed(f"{child.folder / name} differs from {origin}.")


def _compare(
    job: Job, recipe: Recipe, child: Checkpoint, findings: Findings, buffers: threading.local, progress: Progress
) -> None:
    """Compare one piece of the child, as it should be, with all its places."""
    if not hasattr(buffers, "pair"):
        buffers.pair = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(2)]
    digest = hashlib.sha256()
    with ExitStack() as stack:
        places = [(child.tensors[place.tensor], place.offset) for place in job.places]
        files = [_open(stack, info) for info, _ in places]
        done = 0
        for due in _content(job, recipe, buffers.pair[0]):
            digest.update(due)
            found = buffers.pair[1][: len(due)]
            for (info, offset), file in zip(places, files, strict=True):
                begin = offset + done
                read_into(file, found, info.start + begin, info.file)
                if (at := _first_difference(due, found)) is not None:
                    unit, row = _unit(info, begin + at)
                    line = f"{info.name} differs{unit} from {job.origin} at its byte {begin + at:,}{row}"
                    findings.lines.setdefault((info.name, unit), line)
            done += len(due)
            progress(len(due) * len(places))
    for place in job.places:
        findings.pieces[place.tensor][place.offset] = digest.digest()


def _content(job: Job, recipe: Recipe, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes that each of a job's places should hold, at most a buffer at a time."""
    if isinstance(job.content, Made):
        for piece in job.content.pieces():
            for begin in range(0, len(piece), len(buffer)):
                yield piece[begin : begin + len(buffer)]
        return
    info = recipe.parent.info(job.content.tensor)
    with ExitStack() as stack:
        file = _open(stack, info)
        for begin in range(job.content.start, job.content.stop, len(buffer)):
            part = buffer[: min(len(buffer), job.content.stop - begin)]
            read_into(file, part, info.start + begin, info.file)
            yield part


def _unit(info: TensorInfo, at: int) -> tuple[str, str]:
    """Where a byte lies, in words: the slot of a stack of experts; the row of a router (a slot) or of a vocabulary (a token)."""
    if len(info.shape) < 2:
        return "", ""
    place = at * info.shape[0] // info.nbytes
    if ".experts." in info.name:
        return (f" in slot {place}" if len(info.shape) == 3 else ""), ""
    return "", f", in row {place}" if len(info.shape) == 2 else ""


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
