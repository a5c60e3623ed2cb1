"""One source to records: the samples-to-be of a file with what filters need to know of them, in a folder of its own.

The folder holds `records.jsonl`, `measures.jsonl` (a line for each record), pictures and series, and `counts.json`. A record is

    {"name": "t0000000", "kind": "text", "text": what filters and readers see, "meta": {...}}

with `parts` where a sample is more than its pictures and its text, and `images` and `series` (extension of the member -> file in
the folder).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from moexpand.base.errors import InputError
from moexpand.base.files import sha256
from moexpand.data.attached import attached_by_row, brings_series, parts_of
from moexpand.data.chat import ChatSettings, chat_row
from moexpand.data.chat_template import ChatTemplate, load_chat_template
from moexpand.data.document import COUNTS, RECORDS, DocumentLimits
from moexpand.data.image_decode import BadImage, image_size
from moexpand.data.measures import measure
from moexpand.data.named_files import file_inside
from moexpand.data.parsed_docling import extract_docling
from moexpand.data.parsed_mineru import extract_mineru
from moexpand.data.parts import Part, Unusable, text_part
from moexpand.data.pdf import extract_pdf
from moexpand.data.record_templates import RecordTemplates, read_rows
from moexpand.data.series import FILE_BYTES, BadSeries, read_series, sampling_rate
from moexpand.data.shards import cached_tokenizer
from moexpand.data.sources import SourceFile, captions_of, cut, paragraphs
from moexpand.data.tally import Tally

MEASURES = "measures.jsonl"
REFUSED = "refused"
LETTERS = {"text": "t", "figure": "f", "table": "f", "equation": "f", "image": "i", "series": "s", "chat": "c", "record": "r"}
PARQUET_ROWS = 4096
EXTRACTORS: dict[str, Callable[[str, str, DocumentLimits], None]] = {
    "pdf": extract_pdf,
    "mineru": extract_mineru,
    "docling": extract_docling,
}
"""Readers of documents with pages and figures, by format; see document.py."""


@dataclass(frozen=True)
class ReadOptions:
    """How sources become records; every field decides the bytes of the result."""

    tokenizer: str = "qwen"
    sample_characters: int = 6000
    text_key: str = "text"
    pdf: DocumentLimits = field(default_factory=DocumentLimits)
    chat: ChatSettings = field(default_factory=ChatSettings)
    chat_template: str | None = None
    """A jinja file or a Hugging Face folder; None takes the tokenizer's."""
    templates: Mapping[str, Any] | None = None
    """Content of a file of record templates."""
    template: str | None = None
    """Name of the one to fill."""
    seed: int = 0


class Records:
    """Writes the records of a unit as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.documents, self.pages, self.figures = Tally(), Tally(), Tally()
        self.untrained_answers = 0
        self.named: dict[str, str | None] = {}
        """SHA-256 of the files that rows name; None where one could not be used."""
        self.first_left_out = ""
        """The first row or picture of which no sample is made, and why, as a sentence."""
        self._numbers: Counter[str] = Counter()
        self._records: IO[str] = open(folder / f".{RECORDS}", "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._measures: IO[str] = open(folder / MEASURES, "w", encoding="utf-8")  # noqa: SIM115

    def add(
        self,
        kind: str,
        text: str,
        meta: dict[str, Any],
        parts: list[Part] | None = None,
        images: dict[str, str] | None = None,
        series: dict[str, str] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Write a record.

        Args:
            about: caption, inner_text and mentions of a figure, for measures and captioners.
        """
        letter = LETTERS[kind]
        name = f"{letter}{self._numbers[letter]:07d}"
        self._numbers[letter] += 1
        record = {"name": name, "kind": kind, "text": text, "meta": meta} | (about or {})
        if parts is not None:
            record["parts"] = parts
        if images:
            record["images"] = images
        if series:
            record["series"] = series
        files = {"images": list((images or {}).values()), "series": list((series or {}).values())}
        measured = measure(record | files, self.folder)
        if measured["refused_images"]:
            place = meta.get("place") or meta.get("file") or name
            self.leave_out(place, f"a picture cannot be used ({measured['refused_images'][0]})")
        self._records.write(_line(record))
        self._measures.write(_line({"name": name, "kind": kind} | measured))

    def keep_image(self, content: bytes, ending: str) -> str:
        """Put a picture into the folder, named by its content; returns the file's name.

        Raises:
            BadImage: its header shows that it cannot be used.
        """
        image_size(content)
        name = f"{hashlib.sha256(content).hexdigest()[:32]}{ending.lower()}"
        (self.folder / name).write_bytes(content)
        return name

    def keep_series(self, content: bytes, rate: float | None) -> str:
        """Put a time series into the folder likewise.

        Raises:
            BadSeries: it cannot be used.
        """
        sampling_rate(len(read_series(content)), rate)
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.npy"
        (self.folder / name).write_bytes(content)
        return name

    def leave_out(self, place: str, detail: str) -> None:
        """Remember the first of what is left out, for people."""
        self.first_left_out = self.first_left_out or f"{place}: {detail.rstrip('.')}."

    def finish(self, reason: str | None = None) -> None:
        """Close the files; counts.json comes last."""
        self._records.close()
        self._measures.close()
        (self.folder / f".{RECORDS}").replace(self.folder / RECORDS)
        counts = {
            "reason": reason,
            "documents": self.documents.as_json(),
            "pages": self.pages.as_json(),
            "figures": self.figures.as_json(),
            "untrained_answers": self.untrained_answers,
            "named": self.named,
            "first_left_out": self.first_left_out,
        }
        (self.folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


def read_unit(file: SourceFile, folder: str, options: ReadOptions) -> None:
    """Read a source into an existing, empty folder.

    Where the source cannot be opened, or the templates are wrong, the sentence that says so is left in the file `refused`.
    """
    try:
        _read(file, Records(Path(folder)), options)
    except InputError as error:
        (Path(folder) / REFUSED).write_text(str(error), encoding="utf-8")


def _read(file: SourceFile, records: Records, options: ReadOptions) -> None:
    reason = None
    if file.format in EXTRACTORS:
        reason = _read_document(file, records, options)
    elif file.format == "text":
        _read_text(file, records, options)
    elif file.format == "pictures":
        _read_pictures(file, records)
    else:
        _read_rows(file, records, options)
    records.finish(reason)


def _read_document(file: SourceFile, records: Records, options: ReadOptions) -> str | None:
    EXTRACTORS[file.format](str(file.path.resolve()), str(records.folder), options.pdf)
    counts = json.loads((records.folder / COUNTS).read_text(encoding="utf-8"))
    if counts["reason"]:
        records.documents.drop(counts["reason"])
        return str(counts["reason"])
    records.documents.keep()
    records.pages.add(counts["pages"])
    records.figures.add(counts["figures"])
    found = [json.loads(line) for line in (records.folder / RECORDS).read_text(encoding="utf-8").splitlines()]
    for text in cut([record["text"] for record in found if record["kind"] == "text"], options.sample_characters):
        records.add("text", text, {})
    for record in found:
        if record["kind"] != "text":
            about = {key: record[key] for key in ("caption", "inner_text", "mentions") if record.get(key)}
            meta = {key: value for key, value in record.items() if key not in ("kind", "text", "image") and value is not None}
            images = {record["image"].rpartition(".")[2]: record["image"]}
            records.add(record["kind"], record["text"], meta, images=images, about=about)
    return None


def _read_text(file: SourceFile, records: Records, options: ReadOptions) -> None:
    try:
        text = _content(file.path).decode("utf-8-sig")
    except UnicodeDecodeError:
        records.documents.drop("not_utf8")
        return
    if not text.strip():
        records.documents.drop("empty")
        return
    records.documents.keep()
    for piece in cut(paragraphs(text), options.sample_characters):
        records.add("text", piece, {})


def _read_pictures(file: SourceFile, records: Records) -> None:
    for path, caption in captions_of(file.path):
        if caption is None or not caption.strip():
            records.documents.drop("no_caption")
            records.leave_out(path.name, "the picture has no caption")
            continue
        try:
            name = records.keep_image(_content(path), path.suffix)
        except BadImage as problem:
            records.documents.drop(f"image_{problem.reason}")
            records.leave_out(path.name, str(problem))
            continue
        records.documents.keep()
        ending = path.suffix.lower().lstrip(".")
        records.add("image", caption.strip(), {"file": path.name}, images={ending: name}, about={"caption": caption.strip()})


def _read_rows(file: SourceFile, records: Records, options: ReadOptions) -> None:
    rows = _parquet_rows if file.format == "parquet" else read_rows
    reader = _RowReader(file, records, options)
    for place, row in rows(file.path, records.documents):
        try:
            reader.add(place, row)
        except Unusable as problem:
            records.documents.reject(problem.reason)
            records.leave_out(place, problem.detail)


class _RowReader:
    """Rows as conversations ("messages"), as text, with time series before it or without, or through a template."""

    def __init__(self, file: SourceFile, records: Records, options: ReadOptions) -> None:
        self._file, self._records, self._options = file, records, options
        self._template: ChatTemplate | None = None
        self._templates: RecordTemplates | None = None
        if options.templates is not None:
            needs_chat = bool(options.templates.get("domains"))
            self._templates = RecordTemplates(options.templates, self._chat() if needs_chat else None)

    def add(self, place: str, row: dict[str, Any]) -> None:
        """The records of a row.

        Raises:
            Unusable: it makes none.
        """
        if "messages" in row:
            self._add_chat(place, row)
        elif isinstance(text := row.get(self._options.text_key), str):
            # A lone surrogate (a broken escape in JSON) has no UTF-8.
            text = text.encode("utf-8", "replace").decode("utf-8")
            if not text.strip():
                raise Unusable("empty", "there is no text")
            if brings_series(row):
                self._add_series(place, row, text)
                return
            for piece in cut(paragraphs(text), self._options.sample_characters):
                self._records.add("text", piece, {"place": place})
        elif self._templates is not None:
            key = f"{self._file.name}\0{place}"
            filled = self._templates.fill(row, key, self._options.seed, self._options.template)
            meta = {"place": place, "template": filled.template, "variant": filled.variant}
            meta |= {"domain": filled.domain} if filled.domain else {}
            self._records.add("record", filled.text, meta, filled.parts)
        else:
            raise Unusable("no_text_key", f"the row has neither messages nor {self._options.text_key!r}")

    def _add_series(self, place: str, row: dict[str, Any], text: str) -> None:
        attached = attached_by_row(row)
        parts = list(parts_of(attached))
        files = self._files(parts, "series", [entry.file for entry in attached])
        self._records.add("series", text, {"place": place}, [*parts, text_part(text)], series=files)

    def _add_chat(self, place: str, row: dict[str, Any]) -> None:
        rendered = chat_row(row, self._chat(), self._options.chat)
        if self._templates is not None and any(map(self._belongs_to_a_domain, row["messages"])):
            raise Unusable("system_of_a_domain", "its system prompt is that of a domain of the record templates")
        self._records.untrained_answers += rendered.untrained
        for sample in rendered.samples:
            images = self._files(sample.parts, "image", sample.images)
            series = self._files(sample.parts, "series", sample.series)
            self._records.add("chat", sample.text, {"place": place, "answers": sample.answers}, sample.parts, images, series)

    def _belongs_to_a_domain(self, message: Any) -> bool:
        system = isinstance(message, dict) and message.get("role") == "system" and message.get("content")
        return isinstance(system, str) and self._templates is not None and self._templates.owner(system) is not None

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            tokenizer = cached_tokenizer(self._options.tokenizer)
            self._template = load_chat_template(
                self._options.chat_template or self._options.tokenizer, tokenizer, self._options.chat.date
            )
        return self._template

    def _files(self, parts: Sequence[Part], kind: str, files: Sequence[str]) -> dict[str, str]:
        """Member of every image or series part -> the file in the unit's folder."""
        named = [part for part in parts if kind in part]
        return {part[kind]: self._file_of(part, kind, file) for part, file in zip(named, files, strict=True)}

    def _file_of(self, part: Part, kind: str, name: str) -> str:
        """A file of a row lies beside the row's file or below; nothing else of the disk is read."""
        self._records.named[name] = None
        path = file_inside(self._file.path.parent, name, kind)
        if kind == "series" and path.stat().st_size > FILE_BYTES:
            raise Unusable("series_too_large", f"the series {name!r} has more than {FILE_BYTES} bytes")
        content = _content(path)
        self._records.named[name] = hashlib.sha256(content).hexdigest()
        try:
            if kind == "series":
                return self._records.keep_series(content, part.get("rate"))
            return self._records.keep_image(content, path.suffix)
        except BadSeries as problem:
            raise Unusable(f"series_{problem.reason}", problem.of(repr(name))) from None
        except BadImage as problem:
            raise Unusable(f"image_{problem.reason}", f"{name!r}: {problem}") from None


def still_true(file: SourceFile, folder: Path) -> bool:
    """Whether the files that the rows of a source name are those of the unit that was made of it."""
    counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return all(_digest_of_named(file, name) == digest for name, digest in counts.get("named", {}).items())


def _digest_of_named(file: SourceFile, name: str) -> str | None:
    try:
        return sha256(file_inside(file.path.parent, name))
    except (Unusable, OSError):
        return None


def _parquet_rows(path: Path, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, column -> value) of every row; see `read_rows`."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    tally.keep()
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}.") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"The source {path} cannot be read: {error.strerror}.") from None


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n"
