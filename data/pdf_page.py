"""One page of an open PDF: its lines and drawings, and how it is turned upright where its text is read sideways."""

import pypdfium2 as pdfium

from moexpand.data.pdf_labels import CAPTION
from moexpand.data.pdf_layout import Page
from moexpand.data.pdf_objects import TooManyObjects, read_objects
from moexpand.data.pdf_text import Box, Line, is_prose, read_lines

MAX_SIDE_POINTS = 4000.0
"""Longest side of a page that is read, 1.4 metres; a MediaBox may claim kilometres."""
SIDEWAYS = 0.6
"""Part of a page's characters from which their direction is the page's."""
MIN_SIDEWAYS = 40
"""Characters that a page has at least to be turned."""


def read_page(document: pdfium.PdfDocument, number: int) -> tuple[Page | None, str]:
    """A page's visible lines and drawings, or None and the reason why it is dropped.

    Args:
        document: an open document.
        number: of the page, from 0.

    Returns:
        The page and "", or None and `broken_page`, `page_size` or `too_many_objects`.
    """
    try:
        page = document[number]
    except pdfium.PdfiumError:
        return None, "broken_page"
    try:
        width, height = page.get_size()
        if not (0 < width <= MAX_SIDE_POINTS and 0 < height <= MAX_SIDE_POINTS):
            return None, "page_size"
        objects = read_objects(page)
        lines = read_lines(page, objects)
        for line in lines:
            line.page = number
        boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in objects.boxes.tolist()]
        return Page(number, width, height, lines, boxes), ""
    except TooManyObjects:
        return None, "too_many_objects"
    except pdfium.PdfiumError:
        return None, "broken_page"
    finally:
        page.close()


def upright(page: Page) -> Page:
    """The page turned by a quarter if most of its text is read upwards or downwards, as tables too wide for it are set.

    Running heads must have been stripped: they stand as on the other pages.
    """
    characters = [0, 0, 0, 0]
    for line in page.lines:
        characters[line.turn] += len(line.text)
    turn = 1 if characters[1] >= characters[3] else 3
    captions = {line.turn for line in page.lines if CAPTION.match(line.text)}
    # A picture with upright labels, perhaps, but its caption tells how the page is held.
    sideways = captions in ({1}, {3}) and not any(line.turn == 0 and is_prose(line.text) for line in page.lines)
    if sideways:
        turn = captions.pop()
    elif characters[turn] < max(SIDEWAYS * sum(characters), MIN_SIDEWAYS):
        return page
    if any(line.turn == 0 and CAPTION.match(line.text) for line in page.lines):
        # A figure with many labels that stand on end.
        return page
    width, height = page.width, page.height

    def turned(box: Box) -> Box:
        x0, y0, x1, y1 = box
        return (height - y1, x0, height - y0, x1) if turn == 1 else (y0, width - x1, y1, width - x0)

    lines = [
        Line(line.text, *turned(line.box), line.size, line.font, line.mono, line.page, (line.turn - turn) % 4)
        for line in page.lines
    ]
    return Page(page.number, height, width, lines, [turned(box) for box in page.graphics], turn)
