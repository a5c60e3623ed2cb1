"""One PDF to records: running text, and figures and tables as pictures with their captions and the text that speaks of them.

`extract_pdf` is meant to run in a process of its own (sandbox.py): PDFium is not thread-safe, and a hostile file may eat time and
memory. What is refused here is refused with a reason that is counted; forms and scripts are never initialised.
"""

import ctypes
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as raw
from PIL import ImageChops

from moexpand.data.pdf_figures import Caption, find_captions, find_regions
from moexpand.data.pdf_layout import (
    Page,
    Paragraph,
    count_words,
    document_style,
    goes_on,
    gutters,
    join_text,
    paragraph_text,
    paragraphs_of,
    reading_order,
    strip_running_heads,
)
from moexpand.data.pdf_text import INVISIBLE, Box, page_transform, read_lines
from moexpand.data.tally import Tally

RECORDS = "records.jsonl"
COUNTS = "counts.json"
MAX_PAGES = 5000
MAX_SIDE_POINTS = 4000.0
"""Longest side of a page that is read, 1.4 metres; a MediaBox may claim kilometres."""
MAX_PIXELS = 16_000_000
"""Of one cropped picture; larger regions are rendered at a lower resolution."""
MAX_OBJECTS = 200_000
"""Page objects that are looked at."""
MAX_CONTEXT = 3
"""Paragraphs that mention a figure and are kept with it."""


@dataclass(frozen=True)
class PdfLimits:
    """What the user may set."""

    image_dpi: int = 144
    min_figure_points: float = 36.0


class Refused(Exception):
    """The document as a whole is dropped; the text is the reason."""


def extract_pdf(path: str, folder: str, limits: PdfLimits) -> None:
    """Extract one PDF into a folder: records.jsonl, PNG files, counts.json.

    Args:
        path: the PDF.
        folder: an existing, empty folder.
        limits: resolution and smallest figure.

    A record is {"kind": "text", "text", "page"} or {"kind": "figure" | "table", "text", "caption", "number", "page", "box",
    "mentions", "inner_text", "image"}; pages count from 1, boxes are points from the top left. counts.json is {"reason": why the
    whole document is dropped, or null, "pages": tally, "figures": tally}.
    """
    out = Path(folder)
    pages_tally, figures_tally = Tally(), Tally()
    reason = None
    records: list[dict[str, Any]] = []
    try:
        records = _extract(Path(path), out, limits, pages_tally, figures_tally)
    except Refused as refusal:
        reason = str(refusal)
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records]
    (out / RECORDS).write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
    counts = {"reason": reason, "pages": pages_tally.as_json(), "figures": figures_tally.as_json()}
    (out / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


def _open(path: Path) -> pdfium.PdfDocument:
    try:
        document = pdfium.PdfDocument(path)
        if len(document) == 0:
            raise Refused("no_pages")
        return document
    except pdfium.PdfiumError:
        code = raw.FPDF_GetLastError()
        raise Refused("encrypted" if code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY) else "broken") from None


def _extract(path: Path, out: Path, limits: PdfLimits, pages_tally: Tally, figures_tally: Tally) -> list[dict[str, Any]]:
    document = _open(path)
    pages = []
    for number in range(len(document)):
        if number >= MAX_PAGES:
            pages_tally.drop("beyond_page_limit", len(document) - MAX_PAGES)
            break
        page, reason = _read_page(document, number)
        if page is None:
            pages_tally.drop(reason)
        else:
            pages_tally.keep()
            pages.append(page)
    if not pages:
        raise Refused(pages_tally.dropped.most_common(1)[0][0])
    if not any(page.lines for page in pages):
        raise Refused("no_text")

    words = count_words(pages)
    strip_running_heads(pages)
    style = document_style(pages)
    columns = gutters(pages)
    captions = find_captions(pages, columns)
    find_regions(captions, pages, style, columns)
    kept: list[tuple[Caption, str, str]] = []
    for page in pages:
        own = [caption for caption in captions if caption.page == page.number]
        for caption in own:
            image, reason = _crop(document, page, caption, out, limits)
            if image is None:
                figures_tally.drop(reason)
            else:
                figures_tally.keep()
                inner = " ".join(line.text for line in page.lines if caption.region and _holds(caption.region, line.box))
                kept.append((caption, image, inner))
        _remove_figures(page, own)
    texts = _running_text(pages, columns, words)
    records: list[dict[str, Any]] = [{"kind": "text", "page": page, "text": text} for page, text in texts]
    for caption, image, inner in kept:
        text = join_text([line.text for line in caption.lines], words)
        mentions = _mentions(caption, [text for _, text in texts])
        records.append(
            {
                "kind": caption.kind,
                "text": "\n\n".join([text, *mentions]),
                "caption": text,
                "number": caption.number,
                "page": caption.page + 1,
                "box": [round(value, 1) for value in caption.region or caption.box],
                "mentions": mentions,
                "inner_text": inner,
                "image": image,
            }
        )
    return records


def _read_page(document: pdfium.PdfDocument, number: int) -> tuple[Page | None, str]:
    """A page's lines and drawings, or None and the reason why it is dropped."""
    try:
        page = document[number]
    except pdfium.PdfiumError:
        return None, "broken_page"
    try:
        width, height = page.get_size()
        if not (0 < width <= MAX_SIDE_POINTS and 0 < height <= MAX_SIDE_POINTS):
            return None, "page_size"
        graphics, hidden = _drawings(page)
        lines = read_lines(page, hidden)
        for line in lines:
            line.page = number
        return Page(number, width, height, lines, graphics), ""
    except pdfium.PdfiumError:
        return None, "broken_page"
    finally:
        page.close()


def _drawings(page: pdfium.PdfPage) -> tuple[list[Box], bool]:
    """Boxes of what is drawn on a page, and whether some of its text is invisible."""
    transform, width, height = page_transform(page)
    left, bottom, right, top = (ctypes.c_float() for _ in range(4))
    boxes: list[Box] = []
    hidden = False
    for i in range(min(raw.FPDFPage_CountObjects(page.raw), MAX_OBJECTS)):
        item = raw.FPDFPage_GetObject(page.raw, i)
        kind = raw.FPDFPageObj_GetType(item)
        if kind == raw.FPDF_PAGEOBJ_TEXT:
            hidden = hidden or raw.FPDFTextObj_GetTextRenderMode(item) in INVISIBLE
            continue
        hidden = hidden or kind == raw.FPDF_PAGEOBJ_FORM
        if not raw.FPDFPageObj_GetBounds(item, left, bottom, right, top):
            continue
        x0, y0, x1, y1 = transform(left.value, bottom.value, right.value, top.value)
        if x1 > 0 and y1 > 0 and x0 < width and y0 < height:
            boxes.append((max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)))
    return boxes, hidden


def _crop(document: pdfium.PdfDocument, page: Page, caption: Caption, out: Path, limits: PdfLimits) -> tuple[str | None, str]:
    """Render a caption's region to a PNG file, trimmed of white margins. Returns the file's name, or None and the reason."""
    if caption.region is None:
        return None, "no_region"
    x0, y0, x1, y1 = caption.region
    if min(x1 - x0, y1 - y0) < 1.0:
        return None, "too_small"
    scale = limits.image_dpi / 72
    scale = min(scale, (MAX_PIXELS / ((x1 - x0) * (y1 - y0))) ** 0.5)
    source = document[page.number]
    try:
        margins = (x0, page.height - y1, page.width - x1, y0)
        bitmap = source.render(scale=scale, crop=tuple(max(margin, 0.0) for margin in margins), may_draw_forms=False)
        picture = bitmap.to_pil().convert("RGB")
    except (pdfium.PdfiumError, ValueError):
        return None, "not_rendered"
    finally:
        source.close()
    white = picture.copy()
    white.paste((255, 255, 255), (0, 0, *picture.size))
    ink = ImageChops.difference(picture, white).getbbox()
    if ink is None:
        return None, "blank"
    # A table of three rows is flat and still a table.
    smallest = limits.min_figure_points * (0.5 if caption.kind == "table" else 1.0)
    if min(ink[2] - ink[0], ink[3] - ink[1]) < smallest * scale:
        return None, "too_small"
    pad = round(3 * scale)
    picture = picture.crop(
        (max(ink[0] - pad, 0), max(ink[1] - pad, 0), min(ink[2] + pad, picture.width), min(ink[3] + pad, picture.height))
    )
    name = f"{caption.kind}-{caption.page + 1:04d}-{re.sub('[^0-9A-Za-z]', '_', caption.number)}.png"
    picture.save(out / name, optimize=False, compress_level=6)
    return name, ""


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


def _running_text(pages: list[Page], columns: dict[int, float | None], words: Counter[str]) -> list[tuple[int, str]]:
    """(page from 1, text) of every paragraph in reading order, joined where a column or page broke it."""
    texts: list[tuple[int, str]] = []
    last: Paragraph | None = None
    for page in pages:
        for block in reading_order(page.lines, columns[page.number]):
            for i, paragraph in enumerate(paragraphs_of(block)):
                text = paragraph_text(paragraph, words)
                if not text:
                    continue
                if i == 0 and last is not None and not last.mono and not paragraph.mono and goes_on(texts[-1][1], text):
                    texts[-1] = (texts[-1][0], join_text([texts[-1][1], text], words))
                else:
                    texts.append((page.number + 1, text))
                last = paragraph
    return texts


def _mentions(caption: Caption, texts: list[str]) -> list[str]:
    """Paragraphs that speak of the figure by its number."""
    word = r"Fig(?:ure|\.)?s?" if caption.kind == "figure" else r"Tab(?:le|\.)?s?"
    pattern = re.compile(rf"\b{word}\s*{re.escape(caption.number)}(?![\d])", re.I)
    return [text for text in texts if pattern.search(text)][:MAX_CONTEXT]
