"""`moexpand data build`: sources -> records -> filters -> shards with their indexes -> dataset.json.

The bytes of the result depend on the sources and the options alone, not on the number of processes: PDFs are extracted in
parallel but their records are taken in the order of the sources, filters see every record in that order, and each shard is
written whole by one process. The folder appears under its name when everything in it is complete.
"""

import json
import os
import tempfile
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
from moexpand.base.files import disk_errors, new_folder, sha256, write_json
from moexpand.data.dataset import FORMAT_VERSION, SUMMARY
from moexpand.data.filters import Duplicates, Thresholds, drop_reason
from moexpand.data.pdf import COUNTS, RECORDS, PdfLimits, extract_pdf
from moexpand.data.sandbox import run_jobs
from moexpand.data.shards import Sample, write_shard
from moexpand.data.sources import SourceFile, cut, list_sources, paragraphs, read_documents
from moexpand.data.tally import Tally
from moexpand.data.tokens import load_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """How to build; every field but `workers` and `pdf_seconds` decides the bytes of the result."""

    tokenizer: str = "qwen"
    workers: int = 0
    shard_samples: int = 512
    sample_characters: int = 6000
    pdf_seconds: float = 120.0
    pdf: PdfLimits = field(default_factory=PdfLimits)
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass
class _Counts:
    """What every stage took in, kept and dropped."""

    documents: Tally = field(default_factory=Tally)
    pages: Tally = field(default_factory=Tally)
    figures: Tally = field(default_factory=Tally)
    samples: Tally = field(default_factory=Tally)
    kinds: Counter[str] = field(default_factory=Counter)


def build_dataset(pdfs: str | None, sources: list[str], out: Path, options: BuildOptions, say: Say) -> dict[str, Any]:
    """Build a folder of shards.

    Args:
        pdfs: folder of PDF files, searched to the bottom.
        sources: jsonl and plain-text files, or folders of them.
        out: folder to write; must not exist, or be empty.
        options: see `BuildOptions`.
        say: takes one line of progress at a time.

    Returns:
        The content of dataset.json.

    Raises:
        InputError: a source, the tokenizer or the target is wrong, or no sample is left after the filters.
        EnvironmentFailure: the disk is full, a process died.
    """
    _check(options)
    files = list_sources(pdfs, sources)
    tokenizer = load_tokenizer(options.tokenizer)
    workers = options.workers or os.cpu_count() or 1
    counts = _Counts()
    started = time.monotonic()
    with new_folder(out) as folder, tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        extracted = _extract_all([file for file in files if file.format == "pdf"], Path(scratch), options, workers, say)
        samples = _filtered(_samples(files, extracted, counts, options), counts, options.thresholds)
        shards = _write_shards(folder, samples, options, workers, say)
        if not shards:
            drops = counts.documents.dropped + counts.samples.dropped
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(drops.items()))
            raise InputError(f"No sample is left of {len(files)} files (dropped: {reasons or 'nothing'}); nothing was written.")
        summary = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "samples": sum(shard["samples"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "kinds": dict(sorted(counts.kinds.items())),
            "stages": {
                "documents": counts.documents.as_json(),
                "pages": counts.pages.as_json(),
                "figures": counts.figures.as_json(),
                "samples": counts.samples.as_json(),
            },
            "sources": [{"name": file.name, "format": file.format, "sha256": sha256(file.path)} for file in files],
            "options": {key: value for key, value in asdict(options).items() if key not in ("workers", "tokenizer")},
            "shards": shards,
        }
        write_json(folder / SUMMARY, summary)
    seconds = time.monotonic() - started
    say(f"{out}: {summary['samples']} samples, {summary['tokens']} tokens, {len(shards)} shards in {seconds:.1f} s")
    return summary


def _check(options: BuildOptions) -> None:
    for name in ("shard_samples", "sample_characters"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least 1.")
    if options.pdf_seconds <= 0 or options.workers < 0 or not 18 <= options.pdf.image_dpi <= 1200:
        raise InputError(
            f"pdf_seconds is {options.pdf_seconds}, workers {options.workers} and image_dpi {options.pdf.image_dpi}; they must be"
            " above 0, at least 0 and between 18 and 1200."
        )


def _extract_all(
    files: list[SourceFile], scratch: Path, options: BuildOptions, workers: int, say: Say
) -> dict[str, tuple[Path, str | None]]:
    """Extract every PDF into a folder of its own. Name of the source -> that folder, and why its process failed, if it did."""
    folders = [scratch / f"{i:06d}" for i in range(len(files))]
    for folder in folders:
        folder.mkdir()
    jobs = [(str(file.path.resolve()), str(folder), options.pdf) for file, folder in zip(files, folders, strict=True)]
    result: dict[str, tuple[Path, str | None]] = {}
    for number, failure in run_jobs(extract_pdf, jobs, workers, options.pdf_seconds):
        result[files[number].name] = (folders[number], failure)
        say(f"[{len(result)}/{len(files)}] {files[number].name}: {failure or _describe(folders[number])}")
    return result


def _describe(folder: Path) -> str:
    counts = json.loads((folder / COUNTS).read_text())
    if counts["reason"]:
        return str(counts["reason"])
    return f"{counts['pages']['kept']} pages, {counts['figures']['kept']} of {counts['figures']['input']} figures and tables"


def _samples(
    files: list[SourceFile], extracted: dict[str, tuple[Path, str | None]], counts: _Counts, options: BuildOptions
) -> Iterator[Sample]:
    """Samples of all sources in their order."""
    for file in files:
        if file.format == "pdf":
            yield from _pdf_samples(file, *extracted[file.name], counts, options)
        else:
            number = 0
            for place, text in read_documents(file, counts.documents):
                for piece in cut(paragraphs(text), options.sample_characters):
                    meta = {"source": file.name} | ({"place": place} if place else {})
                    yield Sample(f"{file.key}-t{number:07d}", "text", piece, meta)
                    number += 1


def _pdf_samples(file: SourceFile, folder: Path, failure: str | None, counts: _Counts, options: BuildOptions) -> Iterator[Sample]:
    outcome: dict[str, Any] = {"reason": failure} if failure else json.loads((folder / COUNTS).read_text())
    if outcome["reason"]:
        counts.documents.drop(outcome["reason"])
        return
    counts.documents.keep()
    counts.pages.add(outcome["pages"])
    counts.figures.add(outcome["figures"])
    with open(folder / RECORDS, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    texts = cut([record["text"] for record in records if record["kind"] == "text"], options.sample_characters)
    for number, text in enumerate(texts):
        yield Sample(f"{file.key}-t{number:07d}", "text", text, {"source": file.name})
    figures = [record for record in records if record["kind"] != "text"]
    for number, record in enumerate(figures):
        meta = {key: value for key, value in record.items() if key not in ("text", "image")} | {"source": file.name}
        yield Sample(f"{file.key}-f{number:07d}", record["kind"], record["text"], meta, folder / record["image"])


def _filtered(samples: Iterator[Sample], counts: _Counts, thresholds: Thresholds) -> Iterator[Sample]:
    """Drop what the filters refuse and what was there before; count both."""
    duplicates = Duplicates()
    for sample in samples:
        reason = drop_reason(sample.kind, sample.text, thresholds)
        picture = sha256(sample.image) if sample.image is not None else ""
        if reason is None and not duplicates.is_new(f"{picture} {sample.text}"):
            reason = "duplicate"
        if reason is None:
            counts.samples.keep()
            counts.kinds[sample.kind] += 1
            yield sample
        else:
            counts.samples.drop(reason)


def _write_shards(folder: Path, samples: Iterator[Sample], options: BuildOptions, workers: int, say: Say) -> list[dict[str, Any]]:
    """Write shards of `shard_samples` samples, several at a time, with a bounded number of them in memory."""
    done: list[dict[str, Any]] = []
    pending: list[Future[dict[str, Any]]] = []

    def collect(down_to: int) -> None:
        while len(pending) > down_to:
            shard = pending.pop(0).result()
            done.append(shard)
            say(f"{shard['name']}: {shard['samples']} samples, {shard['tokens']} tokens")

    with ExitStack() as stack, disk_errors(f"writing shards into {folder}"):
        pool = None
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        try:
            for number, batch in enumerate(_batches(samples, options.shard_samples)):
                if pool is None:
                    pending.append(Future())
                    pending[-1].set_result(write_shard(folder, number, batch, options.tokenizer))
                else:
                    pending.append(pool.submit(write_shard, folder, number, batch, options.tokenizer))
                collect(2 * workers if pool else 0)
            collect(0)
        except BrokenProcessPool as error:
            raise EnvironmentFailure(f"A process that wrote shards into {folder} died: {error}; start again.") from error
    return done


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
