"""Prove that a child is what its plan makes of its parent: every byte, every name, every file.

Both folders are streamed: what the writer would write is read or made again, once, and compared with all its places, a piece at a
time.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import CheckFailed, InputError
from moexpand.base.files import read_json, sha256
from moexpand.upcycle.calibration import Calibration
from moexpand.upcycle.checkpoint import CONFIG, EXPANSION, INDEX, Checkpoint, open_checkpoint
from moexpand.upcycle.checksums import CHECKSUM, tensor_checksum
from moexpand.upcycle.crew import Progress, default_workers, run_threads
from moexpand.upcycle.direct import MARGIN, aligned_buffer
from moexpand.upcycle.jobs import Job, Task
from moexpand.upcycle.model_code import code_files
from moexpand.upcycle.plan import PARENT_GROUPS, Plan
from moexpand.upcycle.planner import check_counts, check_map
from moexpand.upcycle.reading import PIECE, OneFile, Reader
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import METADATA, TensorInfo, read_metadata

TABLES = ("checksums", "checksum_pieces", "checksums_of_model_code", "checksums_of_tokenizer")
"""What expansion.json holds by the names of tensors or files."""

NAMED = 5
"""How many differences an error names before it only counts."""


@dataclass
class Findings:
    """Differences found so far, and digests of what every tensor should be; threads add to both."""

    pieces: dict[str, dict[int, bytes]]
    """SHA-256 of each piece of each tensor, by its offset."""
    lines: dict[tuple[str, str], str] = field(default_factory=dict)
    """What differs first in each tensor, and in each slot of a stack."""

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
        map_computed: whether the plan's map was computed again; otherwise it was made from a calibration or a usage file that
            was not given, or is a user's own.
    """

    tensors: int
    nbytes: int
    plan: Plan
    map_computed: bool


@dataclass(frozen=True)
class Expansion:
    """What `expansion.json` says."""

    plan: Plan
    parent_groups: Any
    """As recorded; None in children that older versions wrote."""
    plan_checksum: str
    """As recorded."""
    checksums: dict[str, str]
    """By tensor."""
    pieces: dict[str, int]
    """How many pieces the checksum of a tensor is made of, where not one."""
    files: dict[str, str]
    """Of files that are not the parent's: model code, and the tokenizer of a child with a vocabulary of its own."""


def verify(
    source: Path,
    target: Path,
    workers: int = 0,
    progress: Progress = lambda compared: None,
    calibration: Calibration | None = None,
    usage: Path | None = None,
) -> Proof:
    """Prove that every tensor and file of the child `target` equals its recipe.

    Args:
        progress: told how many bytes of the child's shards were compared since its last call, from several threads.
        calibration, usage: those that the plan's map was made from; without them such a map is taken as it is recorded.

    Raises:
        CheckFailed: something differs; the message names the tensors or files.
        InputError: a folder does not exist, the parent is damaged, the target was not written by an expansion, or its map was
            not made from the calibration or the usage file.
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
    check_counts(expansion.plan, str(child.folder / EXPANSION), calibration, usage)
    computed = _check_plan(child, expansion, recipe, calibration, usage)
    _check_structure(child, expansion, recipe)
    progress(folder_bytes(child.folder) - child.nbytes)  # the headers
    findings = Findings({name: {} for name in recipe.tensors})
    queue = _Queue(recipe)
    run_threads(lambda: _Comparer(recipe, child, findings, progress).work(queue), workers or default_workers(), queue.stopping)
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
    odd = record.keys() - plan.to_json().keys() - {PARENT_GROUPS, "checksum_of_plan", "checksum_algorithm", *TABLES}
    if odd:
        raise InputError(f"{file} has {min(odd)}, which no expansion writes; it was changed since it was written.")
    checksums, pieces, code, tokenizer = (record[key] for key in TABLES)
    groups = record.get(PARENT_GROUPS)
    return Expansion(plan, groups, str(record.get("checksum_of_plan")), checksums, pieces, code | tokenizer)


def _check_structure(child: Checkpoint, expansion: Expansion, recipe: Recipe) -> None:
    """Everything but plan and config, and the tensors' bytes."""
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


def _check_plan(
    child: Checkpoint, expansion: Expansion, recipe: Recipe, calibration: Calibration | None, usage: Path | None
) -> bool:
    """Config and map are those that the plan's own words call for, and the plan is the one that was written.

    Returns:
        Whether the map was computed again.
    """
    due = recipe.config
    for key in sorted(due.keys() | child.config.keys()):
        if key not in due or key not in child.config or due[key] != child.config[key]:
            raise CheckFailed(
                f"{child.folder / CONFIG} has {key}={child.config.get(key)!r}, but {due.get(key)!r} follows from the parent."
            )
    try:
        computed = check_map(recipe.parent, recipe.plan, str(child.folder / EXPANSION), calibration, usage)
    except InputError as error:
        raise CheckFailed(str(error)) from None
    groups = recipe.parent.architecture.router_n_groups
    if expansion.parent_groups not in (None, groups):
        raise CheckFailed(
            f"{child.folder / EXPANSION} has {PARENT_GROUPS}={expansion.parent_groups!r}, but the parent routes in {groups}."
        )
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
    code = code_files(child.config)
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


class _Queue:
    """The tasks of a recipe, for threads to share."""

    def __init__(self, recipe: Recipe) -> None:
        self.stopping = threading.Event()
        self._tasks = (task for bundle in recipe.bundles() for task in bundle.tasks)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Task]:
        while not self.stopping.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            yield task


class _Comparer:
    """One thread's comparison of what the child should hold with what its files hold."""

    def __init__(self, recipe: Recipe, child: Checkpoint, findings: Findings, progress: Progress) -> None:
        self.child, self.findings, self.progress = child, findings, progress
        self.reader, self.file, self.buffer = Reader(recipe.parent), OneFile(), aligned_buffer(PIECE + MARGIN)

    def work(self, queue: _Queue) -> None:
        """Do tasks until none is left."""
        with closing(self.reader), closing(self.file):
            for task in queue:
                for job in task:
                    self._compare(job)

    def _compare(self, job: Job) -> None:
        """Compare one piece of the child, as it should be, with all its places."""
        digest = hashlib.sha256()
        done = 0
        for due in self.reader.pieces(job):
            digest.update(due)
            for place in job.places:
                self._compare_piece(job, due, self.child.tensors[place.tensor], place.offset + done)
            done += len(due)
            self.progress(len(due) * len(job.places))
        for place in job.places:
            self.findings.pieces[place.tensor][place.offset] = digest.digest()

    def _compare_piece(self, job: Job, due: memoryview, info: TensorInfo, begin: int) -> None:
        found = self.file.open(info.file).read(self.buffer, info.start + begin, len(due))
        if (at := _first_difference(due, found)) is not None:
            unit, row = _unit(info, begin + at)
            line = f"{info.name} differs{unit} from {job.origin} at its byte {begin + at:,}{row}"
            self.findings.lines.setdefault((info.name, unit), line)


def _unit(info: TensorInfo, at: int) -> tuple[str, str]:
    """Where a byte lies, in words: the slot of a stack of experts; the row of a router (a slot) or of a vocabulary (a token)."""
    if len(info.shape) < 2:
        return "", ""
    place = at * info.shape[0] // info.nbytes
    if ".experts." in info.name:
        return (f" in slot {place}" if len(info.shape) == 3 else ""), ""
    return "", f", in row {place}" if len(info.shape) == 2 else ""


def _first_difference(ours: memoryview, theirs: memoryview) -> int | None:
    """Index of the first byte that differs, None when all are equal."""
    left, right = np.frombuffer(ours, dtype=np.uint8), np.frombuffer(theirs, dtype=np.uint8)
    if np.array_equal(left, right):
        return None
    return int(np.flatnonzero(left != right)[0])
