"""Where text comes from: PDF files, jsonl files with a "text" key, plain-text files, and folders of them."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.data.tally import Tally

FORMATS = {".pdf": "pdf", ".jsonl": "jsonl", ".txt": "text", ".text": "text", ".md": "text", ".rst": "text"}


@dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    path: Path
    name: str
    """The folder that was given, and the path inside it: the same on every machine."""
    format: str
    """pdf, jsonl or text."""

    @property
    def key(self) -> str:
        """Beginning of the keys of its samples: letters, digits, - and _ alone, so that tar readers find the extension."""
        slug = re.sub(r"[^0-9A-Za-z]+", "_", self.path.stem).strip("_")[:40] or "file"
        return f"{slug}-{hashlib.sha256(self.name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def list_sources(pdfs: str | None, sources: list[str]) -> list[SourceFile]:
    """All files that a build reads, in a fixed order.

    Args:
        pdfs: folder of PDF files, or one file.
        sources: files and folders. A file given by itself is plain text unless its name says otherwise; in folders, files of
            other kinds are passed over.

    Raises:
        InputError: a path does not exist, or there is nothing to read.
    """
    found: list[SourceFile] = []
    for place, only in [(pdfs, "pdf")] * bool(pdfs) + [(source, None) for source in sources]:
        root = Path(str(place))
        if root.is_file():
            found.append(SourceFile(root, root.name, only or FORMATS.get(root.suffix.lower(), "text")))
        elif root.is_dir():
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                kind = FORMATS.get(path.suffix.lower())
                if kind is not None and only in (None, kind):
                    name = f"{root.resolve().name}/{path.relative_to(root).as_posix()}"
                    found.append(SourceFile(path, name, kind))
        else:
            raise InputError(f"The source {root} does not exist.")
    if not found:
        given = ", ".join(str(place) for place in (pdfs, *sources) if place)
        raise InputError(f"There is nothing to read: {given or 'neither pdfs nor sources is given'}; {_EXPECTED}.")
    return _with_unique_names(found)


_EXPECTED = "give a folder of PDF files as pdfs=..., or jsonl and text files as sources=[...]"


def _with_unique_names(files: list[SourceFile]) -> list[SourceFile]:
    """Two folders of one name may hold files of one name: the later ones get a number."""
    counts: dict[str, int] = {}
    result = []
    for file in files:
        counts[file.name] = counts.get(file.name, 0) + 1
        number = counts[file.name]
        result.append(file if number == 1 else SourceFile(file.path, f"{file.name}#{number}", file.format))
    return result


def read_documents(file: SourceFile, tally: Tally) -> Iterator[tuple[str, str]]:
    """(place in the file, text) of every document of a jsonl or text file; lines and files that cannot be used are counted.

    Raises:
        InputError: the file cannot be opened.
    """
    try:
        with open(file.path, "rb") as stream:
            if file.format == "text":
                yield from _one(stream.read(), tally)
            else:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield from _json_line(number, line, tally)
    except OSError as error:
        raise InputError(f"The source {file.path} cannot be read: {error.strerror}.") from None


def _one(content: bytes, tally: Tally) -> Iterator[tuple[str, str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        tally.drop("not_utf8")
        return
    yield from _whole("", text, tally)


def _json_line(number: int, line: bytes, tally: Tally) -> Iterator[tuple[str, str]]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        tally.drop("not_json")
        return
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        tally.drop("no_text_key")
        return
    # A lone surrogate (a broken escape in JSON) has no UTF-8.
    yield from _whole(f"line {number}", text.encode("utf-8", "replace").decode("utf-8"), tally)


def _whole(place: str, text: str, tally: Tally) -> Iterator[tuple[str, str]]:
    if not text.strip():
        tally.drop("empty")
        return
    tally.keep()
    yield place, text


def cut(paragraphs: list[str], characters: int) -> list[str]:
    """Join paragraphs into texts that end with the paragraph that passes `characters`; a much longer paragraph is cut itself.

    A short rest joins the text before it.
    """
    texts: list[str] = []
    held: list[str] = []
    size = 0
    for paragraph in (piece for whole in paragraphs for piece in _pieces(whole, 2 * characters)):
        held.append(paragraph)
        size += len(paragraph) + 2
        if size >= characters:
            texts.append("\n\n".join(held))
            held, size = [], 0
    if held:
        rest = "\n\n".join(held)
        if texts and len(rest) < characters // 8:
            texts[-1] += "\n\n" + rest
        else:
            texts.append(rest)
    return texts


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """Cut at the last white space before `longest` characters, or right there."""
    while len(paragraph) > longest:
        at = max(paragraph.rfind(" ", 0, longest), paragraph.rfind("\n", 0, longest))
        at = at if at > longest // 2 else longest
        yield paragraph[:at].rstrip()
        paragraph = paragraph[at:].lstrip()
    if paragraph:
        yield paragraph


def paragraphs(text: str) -> list[str]:
    """Paragraphs of plain text: what empty lines part. Spaces at the beginning of a line stay, for listings."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return [piece.rstrip() for piece in re.split(r"\n[ \t]*\n\s*?(?=\S|[ \t]+\S)", text) if piece.strip()]
