"""The streaming writer: a parent's bytes go from file to file into a child's shards, by a plan.

All headers are written first. Then every tensor of the parent is read once, in pieces of `PIECE` bytes, hashed, and each piece is
written to every place of the child that copies it. Memory is one piece a worker, whatever the model's size.
"""

import hashlib
import mmap
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moexpand.base.files import disk_errors, new_folder, write_atomic, write_json
from moexpand.upcycle.checkpoint import CONFIG, EXPANSION, Checkpoint, read_into, side_file_bytes
from moexpand.upcycle.config_json import grouped_config
from moexpand.upcycle.families import expected_tensors
from moexpand.upcycle.layout import Layout, check_space, copy_side_files, create_shards, open_at, plan_layout
from moexpand.upcycle.model_code import code_files, write_model_code
from moexpand.upcycle.plan import Plan, Recipe, child_architecture, recipes, row_per_line
from moexpand.upcycle.safetensors_file import TensorInfo

PIECE = 8 << 20
CHECKSUM = "sha256"

Progress = Callable[[int], None]
"""Told the number of bytes written since the last call; called from several threads."""


@dataclass(frozen=True)
class Summary:
    """What an expansion did."""

    tensors: int
    shards: int
    bytes_read: int
    bytes_written: int
    seconds: float


def child_layout(parent: Checkpoint, plan: Plan, max_shard_size: str | int = "5GB") -> Layout:
    """The child's shard table; tensors keep the dtype of what they copy."""
    recipe = recipes(parent.architecture, plan)
    shapes = expected_tensors(child_architecture(parent.architecture, plan))
    return plan_layout({name: (parent.info(recipe[name].source).dtype, shape) for name, shape in shapes.items()}, max_shard_size)


def expand(
    parent: Checkpoint,
    plan: Plan,
    target: Path,
    *,
    max_shard_size: str | int = "5GB",
    workers: int = 0,
    progress: Progress = lambda written: None,
) -> Summary:
    """Write the child of `parent` to `target`, which appears whole or not at all.

    Args:
        plan: see `make_plan`.
        max_shard_size: such as `5GB`.
        workers: copying threads; 0 takes one a core.
        progress: told how many bytes were written since its last call, from several threads.

    Raises:
        InputError: `target` exists, or the plan does not fit the parent.
        EnvironmentFailure: the disk is full or failed, or a source file changed while it was read.
    """
    begin = time.monotonic()
    recipe = recipes(parent.architecture, plan)
    layout = child_layout(parent, plan, max_shard_size)
    check_space(target, layout.nbytes + side_file_bytes(parent))
    with new_folder(target) as folder:
        create_shards(folder, layout)
        config = grouped_config(parent.config, plan.num_experts, plan.num_groups)
        copy_side_files(parent.folder, parent.side_files, folder, keep=code_files(config["model_type"]))
        code = write_model_code(folder, config["model_type"])
        write_json(folder / CONFIG, config)
        checksums = copy_tensors(parent, recipe, layout, folder, workers, progress)
        record = plan.to_json() | {
            "checksum_algorithm": CHECKSUM,
            "checksums": {name: checksums[name] for name in layout.tensors},
            "checksums_of_model_code": code,
        }
        write_atomic(folder / EXPANSION, row_per_line(record))
    written = sum(info.nbytes for info in layout.tensors.values())
    return Summary(len(layout.tensors), len(layout.sizes), parent.nbytes, written, time.monotonic() - begin)


def copies_by_source(recipe: Mapping[str, Recipe]) -> dict[str, list[str]]:
    """Names of the child's whole copies of each tensor of the parent."""
    copies: dict[str, list[str]] = defaultdict(list)
    for name, how in recipe.items():
        if how.rows is None:
            copies[how.source].append(name)
    return copies


def gather_rows(parent: Checkpoint, recipe: Recipe) -> np.ndarray:
    """Bytes of a tensor made of rows of the parent's, uint8 [rows, bytes of a row]."""
    info = parent.info(recipe.source)
    return np.frombuffer(parent.read_bytes(recipe.source), dtype=np.uint8).reshape(info.shape[0], -1)[list(recipe.rows or ())]


def copy_tensors(
    parent: Checkpoint, recipe: Mapping[str, Recipe], layout: Layout, folder: Path, workers: int, progress: Progress
) -> dict[str, str]:
    """Write every tensor of `layout` into the shards of `folder` by its recipe; returns the SHA-256 of each by name."""
    checksums: dict[str, str] = {}
    pieces = threading.local()

    def copy(source: str, names: list[str]) -> None:
        if not hasattr(pieces, "view"):
            pieces.view = memoryview(mmap.mmap(-1, PIECE))  # page-aligned
        places = [layout.tensors[name] for name in names]
        checksums.update(dict.fromkeys(names, _copy(parent.info(source), places, folder, pieces.view, progress)))

    def gather(name: str) -> None:
        data = gather_rows(parent, recipe[name]).tobytes()
        with open_at(folder, layout.tensors[name]) as write:
            write(data, 0)
        checksums[name] = hashlib.sha256(data).hexdigest()
        progress(len(data))

    jobs: list[Callable[[], None]] = [partial(copy, source, names) for source, names in copies_by_source(recipe).items()]
    jobs += [partial(gather, name) for name, how in recipe.items() if how.rows is not None]
    run_jobs(jobs, workers)
    return checksums


def _copy(source: TensorInfo, places: list[TensorInfo], folder: Path, view: memoryview, progress: Progress) -> str:
    """Copy one tensor to all its places, a piece at a time; returns the SHA-256 of its bytes."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        writes = [stack.enter_context(open_at(folder, place)) for place in places]
        with disk_errors(f"reading {source.file}"):
            descriptor = os.open(source.file, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        for begin in range(0, source.nbytes, len(view)):
            piece = view[: min(len(view), source.nbytes - begin)]
            read_into(descriptor, piece, source.start + begin, source.file)
            digest.update(piece)
            for write in writes:
                write(piece, begin)
            progress(len(piece) * len(places))
    return digest.hexdigest()


def run_jobs(jobs: list[Callable[[], None]], workers: int) -> None:
    """Run jobs on threads (reads, writes and hashes leave the interpreter lock); the first error stops the rest and is raised."""
    pool = ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1, thread_name_prefix="copy")
    try:
        futures = [pool.submit(job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=True, cancel_futures=True)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
