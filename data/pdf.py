"""One PDF to records: running text, and figures, tables and equations as pictures with the text that speaks of them.

`extract_pdf` is meant to run in a process of its own (sandbox.py): PDFium is not thread-safe, and a hostile file may eat time and
memory. What is refused here is refused with a reason that is counted; forms and scripts are never initialised.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as raw

from moexpand.data.document import (
    MAX_PAGES,
    MIN_EQUATION_POINTS,
    DocumentLimits,
    Refused,
    equation_pattern,
    figure_pattern,
    mentions_of,
    write_result,
)
from moexpand.data.pdf_captions import Caption, find_captions
from moexpand.data.pdf_crop import crop
from moexpand.data.pdf_equations import Equation, find_equations
from moexpand.data.pdf_layout import Page, Style, document_style, gutters, margins_of, strip_running_heads
from moexpand.data.pdf_page import read_page, upright
from moexpand.data.pdf_paragraphs import Text, count_words, join_text, running_text
from moexpand.data.pdf_regions import find_regions
from moexpand.data.pdf_text import Box
from moexpand.data.tally import Tally

STRIP = 4.0
"""A figure that is so many times wider than high is a strip: a drawn scale, one row of boxes, two lines of code."""
STRIP_HEIGHT = 0.25
"""Part of the smallest side of a figure that a strip must be high."""


@dataclass
class _Document:
    """What is known of a document while it is extracted."""

    pdf: pdfium.PdfDocument
    pages: list[Page]
    style: Style
    columns: dict[int, float | None]
    words: Counter[str]


def extract_pdf(path: str, folder: str, limits: DocumentLimits) -> None:
    """Extract one PDF into a folder: records.jsonl, PNG files, counts.json.

    Args:
        path: the PDF.
        folder: an existing, empty folder.
        limits: resolution, smallest figure, whether numbered display equations are wanted.

    What the files hold is said in document.py.
    """
    out = Path(folder)
    pages_tally, figures_tally = Tally(), Tally()
    reason = None
    records: list[dict[str, Any]] = []
    try:
        records = _extract(Path(path), out, limits, pages_tally, figures_tally)
    except Refused as refusal:
        reason = str(refusal)
    write_result(out, records, reason, pages_tally, figures_tally)


def _open(path: Path) -> pdfium.PdfDocument:
    try:
        document = pdfium.PdfDocument(path)
        if len(document) == 0:
            raise Refused("no_pages")
        return document
    except pdfium.PdfiumError:
        code = raw.FPDF_GetLastError()
        raise Refused("encrypted" if code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY) else "broken") from None


def _read(pdf: pdfium.PdfDocument, tally: Tally) -> _Document:
    """All pages, and the document's habits."""
    pages = []
    for number in range(len(pdf)):
        if number >= MAX_PAGES:
            tally.drop("beyond_page_limit", len(pdf) - MAX_PAGES)
            break
        page, reason = read_page(pdf, number)
        if page is None:
            tally.drop(reason)
        else:
            tally.keep()
            pages.append(page)
    if not pages:
        raise Refused(tally.dropped.most_common(1)[0][0])
    if not any(page.lines for page in pages):
        raise Refused("no_text")
    words = count_words(pages)
    strip_running_heads(pages)
    pages = [upright(page) for page in pages]
    style = document_style(pages)
    columns = gutters(pages)
    return _Document(pdf, pages, replace(style, margins=margins_of(pages, columns, style)), columns, words)


def _extract(path: Path, out: Path, limits: DocumentLimits, pages_tally: Tally, figures_tally: Tally) -> list[dict[str, Any]]:
    document = _read(_open(path), pages_tally)
    captions = find_captions(document.pages, document.columns, document.style)
    find_regions(captions, document.pages, document.style, document.columns)
    kept: list[tuple[Caption, str, str]] = []
    regions: dict[int, list[Box]] = {}
    for page in document.pages:
        own = [caption for caption in captions if caption.page == page.number]
        source = document.pdf[page.number] if own else None
        for caption in own:
            name = f"{caption.kind}-{caption.page + 1:04d}-{re.sub('[^0-9A-Za-z]', '_', caption.number)}.png"
            smallest = limits.smallest(caption.kind) * (STRIP_HEIGHT if _is_strip(caption) else 1.0)
            if _crop(source, page, caption.region, limits.image_dpi, smallest, out / name, figures_tally):
                inner = " ".join(line.text for line in page.lines if caption.region and _holds(caption.region, line.box))
                kept.append((caption, name, inner))
        if source is not None:
            source.close()
        regions[page.number] = [caption.region for caption in own if caption.region is not None]
        _remove_figures(page, own)
    texts = running_text(document.pages, document.columns, document.words)
    records = [{"kind": "text", "page": text.page + 1, "text": text.text} for text in texts]
    paragraphs = [text.text for text in texts]
    pages = {page.number: page for page in document.pages}
    for caption, image, inner in kept:
        text = join_text([line.text for line in caption.lines], document.words)
        mentions = mentions_of(caption.number, figure_pattern(caption.label, caption.number), paragraphs)
        box = pages[caption.page].as_shown(caption.region or caption.box)
        records.append(_record(caption.kind, [text, *mentions], text, caption.number, caption.page, box, mentions, inner, image))
    if limits.equations:
        for page in document.pages:
            found = find_equations(page, document.style, document.columns[page.number], regions[page.number], texts)
            records += _equations(document, page, found, texts, limits, out, figures_tally)
    return records


def _record(
    kind: str, text: list[str], caption: str, number: str, page: int, box: Box, mentions: list[str], inner: str, image: str
) -> dict[str, Any]:
    return {
        "kind": kind,
        "text": "\n\n".join(text),
        "caption": caption,
        "number": number,
        "page": page + 1,
        "box": [round(value, 1) for value in box],
        "mentions": mentions,
        "inner_text": inner,
        "image": image,
    }


def _equations(
    document: _Document, page: Page, equations: list[Equation], texts: list[Text], limits: DocumentLimits, out: Path, tally: Tally
) -> list[dict[str, Any]]:
    """Records of a page's equations."""
    records = []
    source = document.pdf[page.number] if equations else None
    for equation in equations:
        name = f"equation-{page.number + 1:04d}-{re.sub('[^0-9A-Za-z]', '_', equation.number)}.png"
        if not _crop(source, page, equation.region, limits.image_dpi, MIN_EQUATION_POINTS, out / name, tally):
            continue
        mentions = mentions_of(equation.number, equation_pattern(equation.number), [text.text for text in texts])
        context = list(dict.fromkeys([*equation.context, *mentions]))
        box = page.as_shown(equation.region)
        records.append(_record("equation", context, "", equation.number, page.number, box, mentions, equation.inner_text, name))
    if source is not None:
        source.close()
    return records


def _crop(
    source: pdfium.PdfPage | None, page: Page, region: Box | None, dpi: int, smallest: float, path: Path, tally: Tally
) -> bool:
    """Render a region of an open page to a PNG file; counts what came of it."""
    if region is None or source is None:
        tally.drop("no_region")
        return False
    whole_rows = smallest == MIN_EQUATION_POINTS
    reason = crop(source, page.as_shown(region), dpi, smallest, path, page.turn, whole_rows=whole_rows)
    if reason:
        tally.drop(reason)
        return False
    tally.keep()
    return True


def _is_strip(caption: Caption) -> bool:
    """Whether a caption belongs to a figure that is flat for its width."""
    if caption.region is None or caption.kind != "figure":
        return False
    return caption.region[2] - caption.region[0] > STRIP * (caption.region[3] - caption.region[1])


def _holds(region: Box, box: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x <= region[2] and region[1] <= y <= region[3]


def _remove_figures(page: Page, captions: list[Caption]) -> None:
    """Take captions and the text inside figures out of the running text; captions without a figure stay in it."""
    found = [caption for caption in captions if caption.region is not None]
    taken = {id(line) for caption in found for line in caption.lines}
    regions = [caption.region for caption in found if caption.region is not None]
    page.lines = [
        line for line in page.lines if id(line) not in taken and not any(_holds(region, line.box) for region in regions)
    ]
