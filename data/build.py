"""`moexpand data build`: sources -> records -> filters -> captions -> shards with their indexes -> dataset.json.

The bytes of the result depend on the sources, the options and the models' answers alone, not on the number of processes: sources
are read in parallel but their records are taken in the order of the sources, and each shard is written whole by one process. The
folder appears under its name when everything in it is complete. A build that was stopped goes on where it was: sources that were
read, answers that were paid for and shards that were written are not made again.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, sha256, write_json
from moexpand.data.captioner import CaptionerSettings
from moexpand.data.dataset import SUMMARY, summary_of
from moexpand.data.document import COUNTS
from moexpand.data.filters import Thresholds
from moexpand.data.ledger import Ledger
from moexpand.data.near_duplicates import NearLimits
from moexpand.data.parsed_files import read_along
from moexpand.data.sandbox import MEMORY_BYTES, run_jobs
from moexpand.data.scorer import ScorerSettings
from moexpand.data.selection import Asked, Unit, captioned, counted, refused, samples_of, scored
from moexpand.data.shards import Sample, cached_tokenizer, write_shard
from moexpand.data.sources import SourceFile, list_sources
from moexpand.data.tally import Tally
from moexpand.data.units import REFUSED, ReadOptions, read_unit, still_true
from moexpand.data.workplace import Workplace, digest_of

Say = Callable[[str], None]

READER_VERSION = 4
"""Another number reads all sources anew where a build goes on."""
UNTRUSTED = ("pdf", "mineru", "docling", "pictures")
"""Formats whose decoders meet hostile files: read in processes of their own, whatever the number of workers."""
ROWS_SECONDS, ROWS_MEMORY = 7 * 24 * 3600.0, 1 << 40
"""Limits for files of rows and text, which may be as large as they like."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build; `workers` and `pdf_seconds` alone do not decide the bytes of the result."""

    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 0
    shard_samples: int = 512
    pdf_seconds: float = 120.0
    thresholds: Thresholds = field(default_factory=Thresholds)
    near: NearLimits = field(default_factory=NearLimits)
    captioner: CaptionerSettings = field(default_factory=CaptionerSettings)
    scorer: ScorerSettings = field(default_factory=ScorerSettings)
    answers: Path | None = None
    """Folder in which models' answers are kept; None takes one beside the target."""


def build_dataset(
    pdfs: str | None, sources: list[str], out: Path, options: BuildOptions, say: Say, api_key: str | None = None
) -> dict[str, Any]:
    """Build a folder of shards.

    Args:
        pdfs: folder of PDF files, searched to the bottom.
        sources: files and folders; see `sources.list_sources`.
        out: folder to write; must not exist, or be empty.
        options: see `BuildOptions`.
        say: takes one line of progress at a time.
        api_key: for the endpoints of captioning and scoring models.

    Returns:
        The content of dataset.json.

    Raises:
        InputError: a source, the tokenizer or the target is wrong, or no sample is left after the filters.
        EnvironmentFailure: the disk is full, a process died, an endpoint cannot be reached.
    """
    _check(options)
    files = list_sources(pdfs, sources)
    tokenizer = cached_tokenizer(options.read.tokenizer)
    workers = options.workers or os.cpu_count() or 1
    answers = options.answers or out.parent / f".{out.name}.answers"
    asked = Asked(options.captioner, options.scorer, answers, api_key, Ledger("captions"), Ledger("scores"))
    tallies = {stage: Tally() for stage in ("documents", "pages", "figures", "captions", "samples")}
    kinds: Counter[str] = Counter()
    started = time.monotonic()
    with Workplace(out) as work:
        digests = [_digest(file) for file in files]
        units = _read_all(files, digests, work, options, workers, tallies, say)
        reasons = refused(units, options.thresholds, options.near)
        samples = captioned(samples_of(units, reasons, tallies["samples"]), asked, tallies["captions"], say)
        samples = counted(scored(samples, asked, options.thresholds, tallies["samples"], say), kinds)
        shards = _write_shards(work, samples, options, tokenizer.fingerprint, workers, say)
        if not shards:
            drops = tallies["documents"].dropped + tallies["samples"].dropped
            said = ", ".join(f"{reason} {count}" for reason, count in sorted(drops.items()))
            first = _first(units)
            work.remove()
            raise InputError(
                f"No sample is left of {len(files)} files (dropped: {said or 'nothing'}); nothing was written.{first}"
            )
        read = [{"name": file.name, "format": file.format, "sha256": digest} for file, digest in zip(files, digests, strict=True)]
        summary = summary_of(tokenizer, shards, kinds, tallies, read, _written_options(options))
        write_json(work.shards / SUMMARY, summary)
        work.publish(len(shards))
    for name, wanted, ledger in (
        ("captions", options.captioner.routes, asked.captions),
        ("scores", options.scorer.route, asked.scores),
    ):
        if wanted:
            ledger.write(answers / f"{name}.json")
    seconds = time.monotonic() - started
    say(f"{out}: {summary['samples']} samples, {summary['tokens']} tokens, {len(shards)} shards in {seconds:.1f} s")
    return summary


def _check(options: BuildOptions) -> None:
    for name, value in (("shard_samples", options.shard_samples), ("sample_characters", options.read.sample_characters)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    if options.pdf_seconds <= 0 or options.workers < 0 or not 18 <= options.read.pdf.image_dpi <= 1200:
        raise InputError(
            f"pdf_seconds is {options.pdf_seconds}, workers {options.workers} and image_dpi {options.read.pdf.image_dpi}; they"
            " must be above 0, at least 0 and between 18 and 1200."
        )


def _written_options(options: BuildOptions) -> dict[str, Any]:
    """What decides the bytes, for dataset.json; addresses of endpoints may be private and stay out."""
    written = asdict(options)
    for name in ("workers", "pdf_seconds", "answers", "captioner", "scorer"):
        written.pop(name)
    written["captioner"] = {
        "routes": {route.name: route.model for route in options.captioner.routes},
        "seed": options.captioner.seed,
    }
    written["scorer"] = options.scorer.route.model if options.scorer.route else None
    return written


def _digest(file: SourceFile) -> str:
    """SHA-256 of a source; where it is made of several files, over their names and digests."""
    if file.format == "pictures":
        inside = sorted(path for path in file.path.iterdir() if path.is_file())
    elif file.format in ("mineru", "docling"):
        inside = [file.path, *read_along(file.path, file.format)]
    else:
        return sha256(file.path)
    return hashlib.sha256(
        "".join(f"{path.name}\0{sha256(path)}\n" for path in inside).encode(errors="surrogateescape")
    ).hexdigest()


def _read_all(
    files: list[SourceFile],
    digests: list[str],
    work: Workplace,
    options: BuildOptions,
    workers: int,
    tallies: dict[str, Tally],
    say: Say,
) -> list[Unit]:
    """Read every source into a folder of its own, or find that it has been."""
    names = [
        digest_of(READER_VERSION, file.name, file.format, digest, asdict(options.read))
        for file, digest in zip(files, digests, strict=True)
    ]
    folders: dict[int, Path] = {}
    failures: dict[int, str] = {}
    todo: list[int] = []
    for number, name in enumerate(names):
        folder, done = work.unit(name)
        if done and not still_true(files[number], folder):
            work.forget(folder)
            folder, done = work.unit(name)
        folders[number] = folder
        if not done:
            todo.append(number)
    if len(todo) < len(files):
        say(f"going on: {len(files) - len(todo)} of {len(files)} sources have been read")
    ended = len(files) - len(todo)
    for number, failure in _jobs(files, folders, todo, options, workers):
        ended += 1
        refusal = folders[number] / REFUSED
        if refusal.is_file():
            raise InputError(refusal.read_text(encoding="utf-8"))
        if failure and files[number].format not in UNTRUSTED:
            raise EnvironmentFailure(f"Reading {files[number].path} ended with {failure}; start again to go on.")
        if failure:
            failures[number] = failure
        else:
            folders[number] = work.unit_done(folders[number])
        say(f"[{ended}/{len(files)}] {files[number].name}: {failure or _describe(folders[number])}")
    units = []
    for number, file in enumerate(files):
        if number in failures:
            tallies["documents"].drop(failures[number])
            continue
        counts = _counts(folders[number])
        for stage in ("documents", "pages", "figures"):
            tallies[stage].add(counts[stage])
        units.append(Unit(file, folders[number]))
    return units


def _jobs(
    files: list[SourceFile], folders: dict[int, Path], todo: list[int], options: BuildOptions, workers: int
) -> Iterator[tuple[int, str | None]]:
    """Run the reader of every source; yields its number and why it failed, as they end."""

    def run(numbers: list[int], seconds: float, memory: int) -> Iterator[tuple[int, str | None]]:
        jobs = [(files[number], str(folders[number].resolve()), options.read) for number in numbers]
        for place, failure in run_jobs(read_unit, jobs, workers, seconds, memory):
            yield numbers[place], failure

    trusted = [number for number in todo if files[number].format not in UNTRUSTED]
    if workers == 1:
        for number in trusted:
            read_unit(files[number], str(folders[number]), options.read)
            yield number, None
    else:
        yield from run(trusted, ROWS_SECONDS, ROWS_MEMORY)
    yield from run([number for number in todo if number not in trusted], options.pdf_seconds, MEMORY_BYTES)


def _describe(folder: Path) -> str:
    counts = _counts(folder)
    if counts["reason"]:
        return str(counts["reason"])
    told = f"; the first left out is {counts['first_left_out']}" if counts["first_left_out"] else ""
    if counts["pages"]["input"]:
        return f"{counts['pages']['kept']} pages, {counts['figures']['kept']} of {counts['figures']['input']} figures and tables"
    return f"{counts['documents']['kept']} of {counts['documents']['input']} documents{told}"


def _first(units: list[Unit]) -> str:
    """The first row or picture that is left out and why, as one more sentence."""
    found = ((unit.file.name, _counts(unit.folder)["first_left_out"]) for unit in units)
    return next((f" The first left out is {name}: {detail}" for name, detail in found if detail), "")


def _counts(folder: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return counts


def _write_shards(
    work: Workplace, samples: Iterator[Sample], options: BuildOptions, tokenizer: str, workers: int, say: Say
) -> list[dict[str, Any]]:
    """Write shards of `shard_samples` samples, several at a time, with a bounded number of them in memory."""
    done: list[dict[str, Any]] = []
    pending: list[tuple[int, str, Future[dict[str, Any]] | dict[str, Any]]] = []

    def collect(down_to: int) -> None:
        while len(pending) > down_to:
            number, digest, entry = pending.pop(0)
            if isinstance(entry, Future):
                entry = entry.result()
                work.shard_done(number, digest, entry)
                say(f"{entry['name']}: {entry['samples']} samples, {entry['tokens']} tokens")
            done.append(entry)

    with ExitStack() as stack, disk_errors(f"writing shards into {work.folder}"):
        pool = None
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        try:
            for number, batch in enumerate(_batches(samples, options.shard_samples)):
                digest = _content_digest(batch, tokenizer)
                known = work.written(number, digest)
                if known is not None:
                    pending.append((number, digest, known))
                elif pool is None:
                    future: Future[dict[str, Any]] = Future()
                    future.set_result(write_shard(work.shards, number, batch, options.read.tokenizer))
                    pending.append((number, digest, future))
                else:
                    pending.append((number, digest, pool.submit(write_shard, work.shards, number, batch, options.read.tokenizer)))
                collect(2 * workers if pool else 0)
            collect(0)
        except BrokenProcessPool as error:
            raise EnvironmentFailure(f"A process that wrote shards into {work.folder} died: {error}; start again.") from error
    return done


def _content_digest(samples: list[Sample], tokenizer: str) -> str:
    content = [
        [sample.key, sample.kind, sample.parts, sample.meta, _digests(sample.images | sample.series)] for sample in samples
    ]
    return digest_of(tokenizer, content)


def _digests(files: dict[str, Path]) -> dict[str, str]:
    return {name: sha256(path) for name, path in files.items()}


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
