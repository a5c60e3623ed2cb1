"""Which JSON files are documents that MinerU or docling parsed, and which other files came with them."""

import re
from collections.abc import Iterator
from pathlib import Path

from moexpand.base.errors import InputError

CONTENT_LIST = re.compile(r"(?P<start>(?:(?P<name>.+)_)?)content_list(?P<second>_v2)?\.json", re.DOTALL)
"""Names that MinerU gives: with the document's name before it, or without."""
OTHER_LIST = re.compile(r"(?P<start>(?:.+_)?)structured_content\.json", re.DOTALL)
"""What MinerU 4 writes; not read."""
ORIGIN = "origin.pdf"
"""End of the name of the PDF that MinerU parsed, where it copies it."""
WITH_A_LIST = ("content_list_v2.json", "layout.pdf", "span.pdf", "spans.pdf", ORIGIN, "model_output.txt")
"""Ends of names of what MinerU writes beside a content list and what would be a source of its own otherwise."""
CLOUD_TEXT = "full.md"
"""The Markdown of a document from MinerU's web service."""
_DOCLING = re.compile(rb'"schema_name"\s*:\s*"DoclingDocument"')
_HEAD_BYTES = 4096


def parsed_format(path: Path) -> str | None:
    """mineru or docling, or None for a JSON file that is neither."""
    if CONTENT_LIST.fullmatch(path.name):
        return "mineru"
    try:
        with open(path, "rb") as file:
            # docling writes this key first.
            return "docling" if _DOCLING.search(file.read(_HEAD_BYTES)) else None
    except OSError:
        return None


def named_format(path: Path) -> str:
    """Format of a JSON file that the user names.

    Raises:
        InputError: it is neither.
    """
    found = parsed_format(path)
    if found is None:
        raise InputError(
            f"The source {path} is neither a content list of MinerU (NAME_content_list.json) nor a DoclingDocument of docling;"
            " other JSON is read as rows, one a line, from .jsonl files."
        )
    return found


def refuse_other_list(path: Path) -> None:
    """Raise InputError for output of MinerU 4 that has no content list beside it: its text would be read without its figures."""
    match = OTHER_LIST.fullmatch(path.name)
    if match and not any(path.with_name(match["start"] + end).is_file() for end in ("content_list.json", "content_list_v2.json")):
        raise InputError(
            f"{path} is output of MinerU 4 in a form that is not read; render the document's content list"
            " (RenderFormat.CONTENT_LIST) to NAME_content_list.json beside it, or leave its folder out."
        )


def came_along(path: Path, kind: str) -> set[Path]:
    """Files of the same output, whether they exist or not, which say what the JSON says and are no sources of their own."""
    match = CONTENT_LIST.fullmatch(path.name)
    if kind == "mineru" and match:
        names = [match["start"] + end for end in WITH_A_LIST]
        names += [f"{match['name']}.md"] if match["name"] else []
        return {path.with_name(name) for name in (*names, CLOUD_TEXT)} - {path}
    return {path.with_suffix(ending) for ending in (".md", ".txt")}


def read_along(path: Path, kind: str) -> Iterator[Path]:
    """Files that the records of a parsed document depend on beside its JSON, in a fixed order; nothing outside its folder."""
    match = CONTENT_LIST.fullmatch(path.name)
    folder = path.with_name("images" if kind == "mineru" else f"{path.stem}_artifacts")
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    if kind == "mineru" and match:
        files.append(path.with_name(f"{match['start']}middle.json"))
    home = path.parent.resolve()
    for file in files:
        if file.is_file() and file.resolve().is_relative_to(home):
            yield file
