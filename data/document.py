"""What the readers of documents share: their result on disk, and how running text speaks of a figure by its number.

A reader is a function `extract(path, folder, limits)` that reads one document into an existing, empty folder: pdf.py reads PDFs,
parsed_mineru.py and parsed_docling.py what other tools made of them. It leaves two files and the pictures:

- `records.jsonl`: {"kind": "text", "text", "page"} or {"kind": "figure" | "table" | "equation", "text", "caption", "number",
  "page", "box", "mentions", "inner_text", "image"}; pages count from 1, boxes are (x0, y0, x1, y1) in points from the top left of
  the page as it is shown, `image` is a file in the folder. An equation has no caption, and its text is the paragraphs around it.
- `counts.json`: {"reason": why the whole document is dropped, or null, "pages": tally, "figures": tally}; figures, tables and
  equations are counted together.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moexpand.data.tally import Tally

RECORDS = "records.jsonl"
COUNTS = "counts.json"
MAX_PAGES = 5000
MAX_CONTEXT = 3
"""Paragraphs that mention a figure and are kept with it."""
MIN_EQUATION_POINTS = 4.0
"""Smallest side of an equation."""


@dataclass(frozen=True)
class DocumentLimits:
    """What the user may set."""

    image_dpi: int = 144
    min_figure_points: float = 36.0
    equations: bool = False
    """Take display equations as pictures, too."""

    def smallest(self, kind: str) -> float:
        """Least side in points of a figure, table or equation. A table of three rows is flat and still a table."""
        if kind == "equation":
            return MIN_EQUATION_POINTS
        return self.min_figure_points * (0.5 if kind == "table" else 1.0)


class Refused(Exception):
    """The document as a whole is dropped; the text is the reason."""


def write_result(out: Path, records: Iterable[dict[str, Any]], reason: str | None, pages: Tally, figures: Tally) -> None:
    """Write `records.jsonl` and `counts.json` into the folder `out`."""
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
    (out / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
    counts = {"reason": reason, "pages": pages.as_json(), "figures": figures.as_json()}
    (out / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


def figure_pattern(label: str, number: str) -> re.Pattern[str]:
    """How running text speaks of a figure or table by its number.

    Args:
        label: fig, scheme or tab, as `pdf_labels.label_of` gives it.
        number: as the caption writes it.
    """
    words = {"fig": r"Fig(?:ure|\.)?s?", "tab": r"Tab(?:le|\.)?s?", "scheme": r"Schemes?"}
    return re.compile(rf"\b{words[label]}\s*{re.escape(number)}(?![\d]|\.\d)", re.I)


def equation_pattern(number: str) -> re.Pattern[str]:
    """How running text speaks of an equation by its number."""
    return re.compile(rf"\b(?:Eqs?\.|Equations?)\s*\(?{re.escape(number)}(?![\d.]\d)\)?", re.I)


def mentions_of(number: str, pattern: re.Pattern[str], texts: list[str]) -> list[str]:
    """The first `MAX_CONTEXT` paragraphs in which a pattern with a number is found."""
    return [text for text in texts if number in text and pattern.search(text)][:MAX_CONTEXT]
