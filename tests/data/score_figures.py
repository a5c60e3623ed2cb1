"""Score the extraction of figures and tables from PDFs against hand-made labels.

The labels are in figure_labels/, one JSON file a document: {"package", "path", "sha256", "pages", "split", "labels"}, each label
{"kind": "figure" | "table", "number", "page": from 1, "box": [x0, y0, x1, y1]}. `package` and `path` say where the PDF is found:
in a Debian package, or (package null) in the repository. Every box was checked by a person's eye on the rendered page.

A box is tight around the ink of the figure or table, in points from the top left of the visible page. Inside: axis labels,
legends, titles, column heads, frames and rules, labels of panels such as "(a)", and notes between the table and its caption.
Outside: the caption, body text, running heads, footnotes of the page. A listing that has a figure caption is a figure. Of a
table that goes on over several pages, the part on the page of its caption is labelled. Only what is seen counts: ink that a clip
hides is not there.

The documents are in two halves, with every style of document in both:

- `tuned`: for developing the extraction. Look at these as much as you like.
- `held_out`: never look at the single results of these to change the extraction, and never use one as a test case while you
  work on it: their only use is the total at the end, which says how well documents do that nobody tuned for. This program
  prints only totals for them. A document that has once been tuned on belongs to `tuned` for ever.

How a prediction (kind, number, page, box) is graded. Both boxes are first trimmed to the ink inside them, as rendered: white
margins are nobody's fault.

- strict: a label has its kind, number and page, and each of the four sides lies within SIDE points of the label's. Six points
  are less than the smallest line pitch in these documents (about eight): a swallowed line of a caption or of body text, a lost
  axis title or a lost row of a table always fails.
- usable: kind, number and page agree, and the boxes' intersection over union is at least 0.6. Strict ones are usable too.
- wrong: the rest, and all after the first that name the same label.

precision = right / predictions, recall = right / labels.

    python tests/data/score_figures.py FOLDER_OF_PDFS [tuned|held_out|all] [--fetch]

runs the extraction on every labelled PDF in the folder; --fetch downloads those that are missing.
"""

import argparse
import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pypdfium2 as pdfium

from moexpand.data.document import RECORDS, DocumentLimits
from moexpand.data.pdf import extract_pdf
from moexpand.data.sample_pdfs import fetch_documents

LABELS = Path(__file__).parent / "figure_labels"
SIDE = 6.0
"""Points that a side may be off."""
USABLE = 0.6
"""Intersection over union of a usable crop."""
SCALE = 2.0
"""Pixels a point when looking for ink."""
WHITE = 247
"""A pixel with a channel up to this is ink; above it is paper, or the noise of a compressed scan."""

Box = tuple[float, float, float, float]
Trim = Callable[[int, Box], Box | None]
"""(page from 1, box) to the box of the ink in it, or None."""


class Item(NamedTuple):
    """A figure or table: labelled, or found."""

    kind: str
    number: str
    page: int
    box: Box


@dataclass(frozen=True)
class Document:
    """A labelled PDF."""

    name: str
    """Of the file, unpacked: parallel.pdf."""
    package: str | None
    path: str
    sha256: str
    pages: int
    split: str
    labels: tuple[Item, ...]


@dataclass
class Score:
    """Counts of one document, or of several added up."""

    labels: int = 0
    predictions: int = 0
    strict: int = 0
    usable: int = 0
    faults: list[str] = field(default_factory=list)
    """What is not strictly right, one line each."""

    def add(self, other: "Score") -> None:
        self.labels += other.labels
        self.predictions += other.predictions
        self.strict += other.strict
        self.usable += other.usable
        self.faults += other.faults

    @property
    def strict_precision(self) -> float:
        return self.strict / max(self.predictions, 1)

    @property
    def strict_recall(self) -> float:
        return self.strict / max(self.labels, 1)

    @property
    def usable_precision(self) -> float:
        return self.usable / max(self.predictions, 1)

    @property
    def usable_recall(self) -> float:
        return self.usable / max(self.labels, 1)


def read_labels(split: str = "all") -> list[Document]:
    """The labelled documents of a half, or all, by name."""
    documents = []
    for path in sorted(LABELS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        labels = tuple(Item(one["kind"], one["number"], one["page"], tuple(one["box"])) for one in data["labels"])
        name = Path(data["path"]).name.removesuffix(".gz")
        document = Document(name, data["package"], data["path"], data["sha256"], data["pages"], data["split"], labels)
        if split in ("all", document.split):
            documents.append(document)
    return documents


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def score(predictions: Iterable[Item], labels: Iterable[Item], trim: Trim) -> Score:
    """Grade what was found in one document.

    Args:
        predictions: figures and tables that were found.
        labels: those that are there.
        trim: gives the ink in a box.
    """
    truth = {(label.kind, label.number, label.page): label for label in labels}
    result = Score(labels=len(truth))
    best: dict[tuple[str, str, int], int] = {}
    for found in predictions:
        result.predictions += 1
        key = found[:3]
        name = f"{found.kind} {found.number} on page {found.page}"
        if key not in truth:
            result.faults.append(f"{name}: no such label")
            continue
        label, box = trim(found.page, truth[key].box), trim(found.page, found.box)
        grade = 0
        if box is not None and label is not None:
            off = [round(mine - its, 1) for mine, its in zip(box, label, strict=True)]
            grade = 2 if max(map(abs, off)) <= SIDE else int(overlap(box, label) >= USABLE)
        if key in best:
            result.faults.append(f"{name}: found twice")
            continue
        best[key] = grade
        if grade < 2:
            where = "no ink in the box" if box is None or label is None else f"left, top, right, bottom off by {off}"
            result.faults.append(f"{name}: {'usable' if grade else 'wrong'}, {where}")
    result.strict = sum(grade == 2 for grade in best.values())
    result.usable = sum(grade >= 1 for grade in best.values())
    result.faults += [
        f"{kind} {number} on page {page}: missed" for kind, number, page in truth if (kind, number, page) not in best
    ]
    return result


class Ink:
    """Where the pages of a PDF have ink."""

    def __init__(self, path: Path) -> None:
        self.document = pdfium.PdfDocument(path)
        self.pages: dict[int, np.ndarray] = {}

    def trim(self, page: int, box: Box) -> Box | None:
        """The box of the ink inside a box, or None where there is none.

        Args:
            page: from 1.
            box: in points from the top left.
        """
        if page not in self.pages:
            source = self.document[page - 1]
            picture = source.render(scale=SCALE, may_draw_forms=False).to_pil().convert("RGB")
            self.pages = {page: np.asarray(picture).min(axis=2) <= WHITE}
            source.close()
        ink = self.pages[page]
        x0, y0 = (max(int(np.floor(value * SCALE)), 0) for value in box[:2])
        x1, y1 = (max(int(np.ceil(value * SCALE)), 0) for value in box[2:])
        part = ink[y0:y1, x0:x1]
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        if not len(rows):
            return None
        left, top, right, bottom = x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1
        return (float(left / SCALE), float(top / SCALE), float(right / SCALE), float(bottom / SCALE))


def extract(path: Path) -> list[Item]:
    """Run the extraction on a PDF, with its default settings."""
    with tempfile.TemporaryDirectory() as folder:
        extract_pdf(str(path), folder, DocumentLimits())
        with open(Path(folder) / RECORDS, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    return [
        Item(record["kind"], record["number"], record["page"], tuple(record["box"]))
        for record in records
        if record["kind"] in ("figure", "table")
    ]


def is_labelled(path: Path, document: Document) -> bool:
    """The file is there and is the very one that was labelled: another release may have other pages."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == document.sha256


def score_document(path: Path, document: Document) -> Score:
    """Extract one PDF and grade what was found."""
    found = sorted(extract(path), key=lambda item: item.page)
    # PDFium keeps what its Python objects hold until they are collected.
    gc.collect()
    return score(found, document.labels, Ink(path).trim)


def fetch_labelled(folder: Path, documents: list[Document], say: Callable[[str], None]) -> list[str]:
    """Download what is missing; returns the names of the documents that are still not there as they were labelled."""
    missing = [document for document in documents if not is_labelled(folder / document.name, document)]
    fetch_documents(folder, [(document.package, document.path) for document in missing], say)
    return [document.name for document in missing if not is_labelled(folder / document.name, document)]


COLUMNS = ("P strict", "R strict", "P usable", "R usable")
HEAD = f"{'':28}{'labels':>7}{'found':>7}{'strict':>7}{'usable':>7}" + "".join(f"{name:>10}" for name in COLUMNS)


def line(name: str, one: Score) -> str:
    """A row of the table."""
    shares = (one.strict_precision, one.strict_recall, one.usable_precision, one.usable_recall)
    counts = f"{one.labels:7}{one.predictions:7}{one.strict:7}{one.usable:7}"
    return f"{name:28}{counts}" + "".join(f"{100 * share:9.1f}%" for share in shares)


def score_split(folder: Path, split: str, say: Callable[[str], None]) -> Score:
    """Grade the documents of one half that are in a folder and print a table: single documents and faults only of `tuned`."""
    total = Score()
    say(HEAD)
    for document in read_labels(split):
        if not is_labelled(folder / document.name, document):
            say(f"{document.name}: not in the folder as it was labelled")
            continue
        one = score_document(folder / document.name, document)
        total.add(one)
        if document.split == "tuned":
            say(line(document.name, one))
            for fault in one.faults:
                say(f"    {fault}")
    say(line(split, total))
    return total


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Score the extraction of figures against hand-made labels.")
    parser.add_argument("folder", type=Path, help="folder of PDFs")
    parser.add_argument("split", nargs="?", choices=("tuned", "held_out", "all"), default="tuned")
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    options = parser.parse_args()
    splits = ("tuned", "held_out") if options.split == "all" else (options.split,)
    for split in splits:
        if options.fetch:
            fetch_labelled(options.folder, read_labels(split), print)
        score_split(options.folder, split, print)


if __name__ == "__main__":
    main()
