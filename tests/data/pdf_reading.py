"""What the tests of extraction share: body text that is told apart from anything else, and reading of records."""

import json
from pathlib import Path
from typing import Any

from moexpand.data.document import COUNTS, RECORDS, DocumentLimits
from moexpand.data.pdf import extract_pdf

BODY = [
    "This is running text that fills the whole width of the page and goes on so that nobody takes it for",
    "anything else; it has several lines at one pitch, and its font is the font of the whole document, all",
    "of which makes it easy for a reader to see where it ends and where something else begins on the page.",
]


def extract(pdf: Path, folder: Path, limits: DocumentLimits | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records and counts of a PDF."""
    folder.mkdir()
    extract_pdf(str(pdf), str(folder), limits or DocumentLimits())
    records = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    return records, json.loads((folder / COUNTS).read_text())


def texts_of(records: list[dict[str, Any]]) -> list[str]:
    """Running text."""
    return [record["text"] for record in records if record["kind"] == "text"]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of a kind."""
    return [record for record in records if record["kind"] == kind]
