"""Where samples come from: PDFs, documents that MinerU or docling parsed, rows, plain text, captioned pictures, and folders."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.data.parsed_files import CONTENT_LIST, ORIGIN, came_along, named_format, parsed_format, refuse_other_list

FORMATS = {
    ".pdf": "pdf",
    ".jsonl": "rows",
    ".ndjson": "rows",
    ".csv": "rows",
    ".tsv": "rows",
    ".tab": "rows",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = "metadata.jsonl"
"""In a folder of pictures: rows with "file_name" and "text", as the image folders of Hugging Face's datasets have."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    path: Path
    name: str
    """The folder that was given, and the path inside it: the same on every machine."""
    format: str
    """pdf, mineru, docling, rows, parquet, text, or pictures (a folder of them with captions)."""

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
            other kinds are passed over, and so are files that came along with a document of MinerU or docling, such as its
            Markdown. A folder with pictures of which some have a caption is one source of them, and the
            captions are no texts of their own.

    Raises:
        InputError: a path does not exist, there is nothing to read, or a JSON file is of a form that is not read.
    """
    found: list[SourceFile] = []
    for place, only in [(pdfs, "pdf")] * bool(pdfs) + [(source, None) for source in sources]:
        root = Path(str(place))
        if root.is_file():
            found.append(SourceFile(root, root.name, only or _format_of(root)))
        elif root.is_dir():
            found += _of_folder(root, only)
        else:
            raise InputError(f"The source {root} does not exist.")
    if not found:
        given = ", ".join(str(place) for place in (pdfs, *sources) if place)
        raise InputError(f"There is nothing to read: {given or 'neither pdfs nor sources is given'}; {_EXPECTED}.")
    return _with_unique_names(found)


def _of_folder(root: Path, only: str | None) -> list[SourceFile]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    captions = set() if only else {caption for path in files for caption in _captions_beside(path)}
    parsed = {path: "mineru" for path in files if CONTENT_LIST.fullmatch(path.name)} if only else _parsed(files)
    passed = captions.union(*(came_along(path, kind) for path, kind in parsed.items()))
    if only:
        # Of a document that MinerU parsed the PDF itself is read, and not its copies with boxes drawn on them.
        passed = {path for path in passed if not path.name.endswith(ORIGIN)}
    found = []
    for folder in sorted({caption.parent for caption in captions}):
        inside = folder.relative_to(root).as_posix()
        found.append(SourceFile(folder, root.resolve().name + ("" if inside == "." else f"/{inside}"), "pictures"))
    for path in files:
        kind = parsed.get(path) or FORMATS.get(path.suffix.lower())
        if kind is not None and only in (None, kind) and path not in passed:
            found.append(SourceFile(path, f"{root.resolve().name}/{path.relative_to(root).as_posix()}", kind))
    return sorted(found, key=lambda file: file.path)


def _format_of(path: Path) -> str:
    """Of a file that is named by itself."""
    ending = path.suffix.lower()
    return named_format(path) if ending == ".json" else FORMATS.get(ending, "text")


def _parsed(files: list[Path]) -> dict[Path, str]:
    """The documents among the JSON files of a folder -> mineru or docling."""
    found: dict[Path, str] = {}
    for path in files:
        if path.suffix.lower() == ".json":
            refuse_other_list(path)
            if kind := parsed_format(path):
                found[path] = kind
    return found


def _captions_beside(path: Path) -> list[Path]:
    """The files that caption a picture."""
    if path.suffix.lower() not in PICTURES:
        return []
    return [file for file in (path.with_suffix(".txt"), path.with_name(CAPTIONS)) if file.is_file()]


def captions_of(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(picture, its caption or None) of a folder, sorted by name; a .txt file beside a picture goes before `metadata.jsonl`."""
    rows: dict[str, str] = {}
    if (folder / CAPTIONS).is_file():
        for line in (folder / CAPTIONS).read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("file_name"), str) and isinstance(row.get("text"), str):
                rows[row["file_name"]] = row["text"]
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()):
        beside = path.with_suffix(".txt")
        if beside.is_file():
            yield path, beside.read_bytes().decode("utf-8-sig", "replace")
        else:
            yield path, rows.get(path.name)


_EXPECTED = (
    "give a folder of PDF files as pdfs=..., or jsonl, CSV, parquet and text files, output of MinerU or docling or folders of"
    " pictures with captions as sources=[...]"
)


def _with_unique_names(files: list[SourceFile]) -> list[SourceFile]:
    """Two folders of one name may hold files of one name: the later ones get a number."""
    counts: dict[str, int] = {}
    result = []
    for file in files:
        counts[file.name] = counts.get(file.name, 0) + 1
        number = counts[file.name]
        result.append(file if number == 1 else replace(file, name=f"{file.name}#{number}"))
    return result


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
