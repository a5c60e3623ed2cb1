"""The streaming writer: a parent's bytes go from file to file into a child's shards, by a recipe.

A shard is the unit of work: claimed, written under a temporary name with its full size reserved, synced, renamed, and recorded
in a manifest. What a manifest records is never written again, so that a killed expansion goes on where it was, and several
processes, on one host or many, share the shards of one target. Inside a process threads work on the jobs of a shard together, and
begin the next one when none of it is left (upcycle/crew.py). Every byte of the parent is read once, by the task that needs it, in
pieces of `PIECE` bytes, and each piece is written to all its places. Memory does not depend on the model's size.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moexpand.base.claims import Claims
from moexpand.base.errors import EnvironmentFailure, InputError, MoexpandError, Stopped
from moexpand.base.files import disk_errors, read_json, sha256, write_atomic, write_json
from moexpand.upcycle.checkpoint import CONFIG, EXPANSION, INDEX, file_states, side_file_bytes
from moexpand.upcycle.checksums import CHECKSUM, tensor_checksum
from moexpand.upcycle.crew import Crew, Progress, default_workers, run_threads
from moexpand.upcycle.direct import can_clone
from moexpand.upcycle.jobs import Job
from moexpand.upcycle.layout import Layout, check_space, copy_side_files, parse_size, plan_layout
from moexpand.upcycle.model_code import code_files, write_model_code
from moexpand.upcycle.partial import PartialFolder
from moexpand.upcycle.plan import PARENT_GROUPS, row_per_line
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import ALIGNMENT

FINISH = "finish"
"""What the process claims that completes the folder."""

POLL = 0.5
"""Seconds between looks at what other processes have done."""


@dataclass(frozen=True)
class Summary:
    """What an expansion did.

    Attributes:
        tensors, shards: of the child, whoever wrote them.
        bytes_read, bytes_written: of tensors, by this process.
        seconds: of this process.
        shared: bytes that this process let share the blocks of equal ones instead of writing them.
        resumed: shards that were finished before this process began.
    """

    tensors: int
    shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    shared: int
    resumed: int


def child_layout(recipe: Recipe, max_shard_size: str | int = "5GB") -> Layout:
    """The child's shard table, worked out once."""
    size = parse_size(max_shard_size)
    if size not in recipe.layouts:
        recipe.layouts[size] = plan_layout(recipe.tensors, recipe.bundles(), size)
    return recipe.layouts[size]


def expand(
    recipe: Recipe,
    target: Path,
    *,
    max_shard_size: str | int = "5GB",
    workers: int = 0,
    reflink: str = "auto",
    resume: bool = False,
    progress: Progress = lambda written: None,
    found: Progress = lambda finished: None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Write the child of `recipe` to `target`, which appears whole or not at all.

    Args:
        max_shard_size: such as `5GB`.
        workers: copying threads; 0 takes two a core, at most 16.
        reflink: `auto` lets equal pieces share blocks where the file system can; `never` writes each.
        resume: go on with an unfinished expansion of the same parameters, or work on it together with the processes that do;
            one that is complete by now is left as it is.
        progress: told how many bytes were put into place since its last call, from several threads.
        found: told how many bytes others, or an earlier run, have finished.
        say: takes a line when there is something to wait for.

    Raises:
        InputError: `target` exists, an unfinished expansion is there without `resume` or with other parameters.
        EnvironmentFailure: the disk is full or failed, or a source file changed while it was read.
        Stopped: SIGINT or SIGTERM; finished shards are kept.
    """
    begin = time.monotonic()
    source = file_states(recipe.parent)
    layout = child_layout(recipe, max_shard_size)
    partial = PartialFolder(Path(target), layout)
    identity = recipe.plan.to_json() | {"max_shard_size": parse_size(max_shard_size), "layout": layout.digest}
    if not _begin(recipe, partial, identity, resume):
        found(layout.nbytes)
        return Summary(len(layout.tensors), len(layout.sizes), 0, 0, time.monotonic() - begin, 0, len(layout.sizes))
    claims = Claims(partial.claims)
    crew = Crew(recipe, partial, claims, reflink == "auto" and can_clone(partial.writing), progress, found)
    resumed = 0
    with claims.refreshed(), _stopped_by_signals(crew.stopping) as signals:
        try:
            with disk_errors(f"writing {target}"):
                partial.sweep(claims)
                resumed = len(crew.look())
                _check_space(recipe, crew)
                _write(recipe, crew, workers, say, source)
            if signals and not _published(recipe, partial):
                raise Stopped(f"Stopped by {signals[0]}.")
        except BaseException as error:
            crew.abandon()
            if not isinstance(error, EnvironmentFailure | InputError) or not _published(recipe, partial):
                _give_up(crew, error)
    crew.abandon()
    partial.remove()  # what this process made while another, which published the child, removed the folder
    return Summary(
        len(layout.tensors), len(layout.sizes), crew.read, crew.written, time.monotonic() - begin, crew.shared, resumed
    )


def _begin(recipe: Recipe, partial: PartialFolder, identity: dict[str, Any], resume: bool) -> bool:
    """Make or join the working folder; False when there is nothing to join, since the child is complete."""
    try:
        if not resume or not _published(recipe, partial):
            partial.begin(identity, resume)
            return True
    except MoexpandError:
        if not resume or not _published(recipe, partial):  # by another process, a moment ago
            raise
    partial.remove_remains()
    return False


def _write(recipe: Recipe, crew: Crew, workers: int, say: Callable[[str], None], source: dict[Path, tuple[int, int]]) -> None:
    """Write shards until all are finished, by this process or others, and publish the child unless another does."""
    waiting = False
    while True:
        if not waiting or crew.ready():
            run_threads(crew.work, workers or default_workers(), crew.stopping)
        if crew.stopping.is_set() or _published(recipe, crew.partial):
            return
        _check_source(recipe, crew, source)
        finished = crew.look()
        if len(finished) == len(crew.layout.sizes) and crew.claims.take(FINISH) is not None:
            _publish(recipe, crew)
            return
        if not waiting:
            waiting = True
            holders = " and ".join(sorted({str(holder) for holder in crew.claims.live().values()})) or "other processes"
            say(f"Waiting for {holders}; {len(finished)} of {len(crew.layout.sizes)} shards are done.")
        crew.stopping.wait(POLL)


def _check_source(recipe: Recipe, crew: Crew, before: dict[Path, tuple[int, int]]) -> None:
    """Throw away shards of a parent whose files were written to meanwhile: they hold bytes of two kinds."""
    for file, state in file_states(recipe.parent).items():
        if before[file] != state:
            crew.partial.remove()
            raise EnvironmentFailure(f"{file} was changed while it was read; leave the parent alone and start again.")


def _publish(recipe: Recipe, crew: Crew) -> None:
    """Write everything besides the shards and give the folder the target's name."""
    partial, layout = crew.partial, crew.layout
    folder = partial.writing / f"{FINISH}.{crew.claims.held[FINISH][1].token}"
    folder.mkdir()
    write_json(folder / INDEX, layout.index())
    write_json(folder / CONFIG, recipe.config)
    copy_side_files(recipe.parent.folder, recipe.kept_side_files, folder, keep=code_files(recipe.config))
    if recipe.tokenizer is not None:
        copy_side_files(recipe.tokenizer, recipe.own_side_files, folder)
    own = {
        "checksums_of_model_code": write_model_code(folder, recipe.config),
        "checksums_of_tokenizer": {str(file): sha256(folder / file) for file in recipe.own_side_files},
    }
    write_atomic(folder / EXPANSION, row_per_line(_record(recipe, partial) | own))
    partial.publish(folder)


def _record(recipe: Recipe, partial: PartialFolder) -> dict[str, Any]:
    """The plan, the parent's groups, and checksums of tensors by name."""
    checksums = partial.checksums()
    return recipe.plan.to_json() | {
        PARENT_GROUPS: recipe.parent.architecture.router_n_groups,
        "checksum_of_plan": recipe.plan.digest,
        "checksum_algorithm": CHECKSUM,
        "checksum_pieces": {name: len(pieces) for name, pieces in checksums.items() if len(pieces) > 1},
        "checksums": {name: tensor_checksum(pieces) for name, pieces in checksums.items()},
    }


def _published(recipe: Recipe, partial: PartialFolder) -> bool:
    """Whether the target is there, complete and of this recipe."""
    try:
        record = read_json(partial.target / EXPANSION)
        sizes = {file.name: file.stat().st_size for file in partial.target.glob("*.safetensors")}
    except (InputError, OSError):
        return False
    return isinstance(record, dict) and sizes == partial.layout.sizes and record.get("checksum_of_plan") == recipe.plan.digest


def _check_space(recipe: Recipe, crew: Crew) -> None:
    """Refuse when what is left to write does not fit the disk; shards in work have their space already."""
    finished = set(crew.known)
    left = sum(size for file, size in crew.layout.sizes.items() if file not in finished) + side_file_bytes(recipe.parent)
    if crew.reflink:
        left -= sum(
            _shareable(crew.layout, job)
            for bundle in recipe.bundles()
            if str(crew.layout.tensors[bundle.tensors[0]].file) not in finished
            for job in bundle.jobs
        )
    check_space(crew.partial.folder, left - crew.partial.reserved())


def _shareable(layout: Layout, job: Job) -> int:
    """Bytes of a job that reflinks save."""
    starts = [layout.tensors[place.tensor].start + place.offset for place in job.places]
    if job.nbytes % ALIGNMENT or starts[0] % ALIGNMENT:
        return 0
    return job.nbytes * sum(start % ALIGNMENT == 0 for start in starts[1:])


def _give_up(crew: Crew, error: BaseException) -> None:
    """Remove what is unfinished and raise `error`, which says what was kept."""
    partial = crew.partial
    kept = "nothing was left behind"
    try:
        same = partial.same()
        finished = len(partial.finished()) if same else 0
        ours = {holder.token for _, holder in crew.claims.held.values()}
        if finished or (same and any(holder.token not in ours for holder in crew.claims.live().values())):
            count = f"{finished} of {len(crew.layout.sizes)} shards"
            kept = f"{count} are finished in {partial.folder}, and resume=true goes on with them"
        else:
            partial.remove()
    except OSError:  # what is there cannot be seen, so nothing is removed
        kept = f"what was finished is in {partial.folder}, and resume=true goes on with it"
    if not isinstance(error, MoexpandError):
        raise error
    raise type(error)(f"{str(error).removesuffix('.')}; {kept}.") from error


@contextmanager
def _stopped_by_signals(stopping: threading.Event) -> Iterator[list[str]]:
    """The first SIGINT or SIGTERM inside the body sets `stopping` and its name is in the list; a second does its usual work."""
    names: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield names
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        stopping.set()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield names
    finally:
        restore()
