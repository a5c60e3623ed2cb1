"""Characters of a PDF page as lines with boxes, fonts and sizes. Needs pypdfium2 and numpy alone.

Coordinates everywhere in the PDF stage: points (1/72 inch), origin at the top left of the visible page, y downwards, after the
page's own rotation; a box is (x0, y0, x1, y1).
"""

import re
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as raw
from numpy.typing import NDArray

from moexpand.data import pdf_native as native
from moexpand.data.pdf_fonts import fit_bitmap_fonts, read_fonts, styles_of
from moexpand.data.pdf_objects import Floats, PageObjects, page_matrix, transform_boxes
from moexpand.data.pdf_visible import visible_characters

Box = tuple[float, float, float, float]

SHAPES = str.maketrans(
    # What PDFium gives for a hyphen at the end of a line.
    dict.fromkeys("\xad\x02\ufffe", "-") | {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"}
)
UNSEEN = ((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xE0000, 0xE0FFF))
"""Code points without a shape: joiners, marks of direction, tags; text can be smuggled in them."""
MAX_CHARACTERS = 500_000
"""Of a page."""
WORD = re.compile(r"[^\W\d_]{2,}[,;:.)]?$")


@dataclass
class Line:
    """A run of characters on one baseline without a wide gap."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    size: float
    """Font size in points, rounded to 0.5."""
    font: str
    mono: bool
    page: int = 0
    turn: int = 0
    """Quarter turns counterclockwise from upright; an axis label that is read upwards has 1."""

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1)"""
        return (self.x0, self.y0, self.x1, self.y1)

    @property
    def width(self) -> float:
        """Points."""
        return self.x1 - self.x0

    @property
    def middle(self) -> float:
        """Height of the line's middle."""
        return (self.y0 + self.y1) / 2


def read_lines(page: pdfium.PdfPage, objects: PageObjects) -> list[Line]:
    """All visible lines of an open page, in the order of the content stream.

    Args:
        page: an open page.
        objects: what `read_objects` found on it.
    """
    text_page = page.get_textpage()
    try:
        return _lines_of(
            page, native.address(text_page.raw), min(raw.FPDFText_CountChars(text_page.raw), MAX_CHARACTERS), objects
        )
    finally:
        text_page.close()


def _lines_of(page: pdfium.PdfPage, text_page: int, count: int, objects: PageObjects) -> list[Line]:
    matrix, width, height = page_matrix(page)
    codes = _codes(text_page, count)
    raw_boxes = np.zeros((count, 4), np.float32)
    start = raw_boxes.ctypes.data
    known = np.fromiter(
        map(native.char_loose_box, repeat(text_page), range(count), range(start, start + 16 * count, 16)), bool, count
    )
    # PDFium's structure is (left, top, right, bottom).
    boxes = transform_boxes(raw_boxes, matrix)
    owners = np.fromiter(map(native.char_object, repeat(text_page), range(count)), np.uint64, count)

    broken = (codes == 10) | (codes == 13)
    space = (codes == 32) | (codes == 0xA0) | ((codes < 32) & (codes != 2) & ~broken) | ((codes >= 0x2000) & (codes <= 0x200A))
    unseen = np.zeros(count, bool)
    for first, last in UNSEEN:
        unseen |= (codes >= first) & (codes <= last)
    on_page = (boxes[:, 2] >= 0) & (boxes[:, 3] >= 0) & (boxes[:, 0] <= width) & (boxes[:, 1] <= height)
    kept = np.flatnonzero(known & ~broken & ~space & ~unseen & on_page & (codes > 0))
    if not len(kept):
        return []
    handles, first_of, owner = np.unique(owners[kept], return_index=True, return_inverse=True)
    # In the order of the page: addresses differ from run to run, and nothing may depend on them.
    order = np.argsort(first_of)
    handles, first_of, owner = handles[order], first_of[order], np.argsort(order)[owner]
    fonts = read_fonts(text_page, [int(handle) for handle in handles], kept[first_of], matrix)
    fonts = fit_bitmap_fonts(fonts, text_page, kept, codes, owner, boxes, matrix)
    sizes = np.array([font.size for font in fonts])
    visible = visible_characters(page, [int(handle) for handle in handles], owner, boxes[kept], sizes, objects)
    kept, owner = kept[visible], owner[visible]
    if not len(kept):
        return []

    box = boxes[kept]
    turns = np.array([font.turn for font in fonts])[owner]
    along0, along1, across0, across1 = _along(box, turns)
    em = np.maximum(across1 - across0, 1.0)[1:]
    overlap = np.minimum(across1[1:], across1[:-1]) - np.maximum(across0[1:], across0[:-1])
    line_breaks = np.cumsum(broken)[kept]
    cut = (overlap < 0.25 * em) | (along0[1:] - along1[:-1] > 1.8 * em) | (along0[1:] < along1[:-1] - 1.5 * em)
    cut |= (line_breaks[1:] != line_breaks[:-1]) | (turns[1:] != turns[:-1])
    starts = np.concatenate([[0], np.flatnonzero(cut) + 1])
    ends = np.append(starts[1:], len(kept))

    spaces = np.cumsum(space)[kept]
    spaced = np.concatenate([[False], spaces[1:] != spaces[:-1]])
    whole, place = _string(codes[kept], spaced)
    style_number, styles = styles_of(fonts)
    style_of = style_number[owner]
    lows = np.minimum.reduceat(box[:, :2], starts, axis=0)
    highs = np.maximum.reduceat(box[:, 2:], starts, axis=0)
    lines = []
    for i, (begin, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        text = whole[place[begin] : place[end - 1] + 1].translate(SHAPES)
        style = styles[int(np.bincount(style_of[begin:end]).argmax())] if end - begin > 1 else styles[style_of[begin]]
        x0, y0, x1, y1 = float(lows[i, 0]), float(lows[i, 1]), float(highs[i, 0]), float(highs[i, 1])
        # Median top and bottom: one tall sign of a mathematical font must not make the whole line tall.
        middle = (end - begin) // 2
        if style.slanted:
            pass
        elif style.turn % 2:
            x0, x1 = sorted(box[begin:end, 0].tolist())[middle], sorted(box[begin:end, 2].tolist())[middle]
        else:
            y0, y1 = sorted(box[begin:end, 1].tolist())[middle], sorted(box[begin:end, 3].tolist())[middle]
        lines.append(Line(text, x0, y0, x1, y1, style.size, style.name, style.mono, turn=style.turn))
    return lines


def _codes(text_page: int, count: int) -> NDArray[np.int64]:
    """Code point of each character."""
    units = np.zeros(count + 1, np.uint16)
    if native.chars_text(text_page, 0, count, units.ctypes.data) == count + 1:
        codes = units[:count].astype(np.int64)
    else:
        # Characters that PDFium leaves out of the text, or that take two units there.
        codes = np.fromiter(map(native.char_unicode, repeat(text_page), range(count)), np.int64, count)
    # Halves of a code point above 0xFFFF come as two characters in one place.
    first = np.flatnonzero((codes[:-1] >> 10 == 0xD800 >> 10) & (codes[1:] >> 10 == 0xDC00 >> 10))
    codes[first] = 0x10000 + ((codes[first] & 0x3FF) << 10) + (codes[first + 1] & 0x3FF)
    codes[first + 1] = 0
    return codes


def _along(boxes: Floats, turns: NDArray[np.int64]) -> tuple[Floats, Floats, Floats, Floats]:
    """Start and end of each character along its line, and its two sides across it, by quarter turn."""
    x0, y0, x1, y1 = boxes.T
    upright = turns % 2 == 0
    start = np.choose(turns, [x0, -y1, -x1, y0])
    end = np.choose(turns, [x1, -y0, -x0, y1])
    return start, end, np.where(upright, y0, x0), np.where(upright, y1, x1)


def _string(codes: NDArray[np.int64], spaced: NDArray[np.bool_]) -> tuple[str, list[int]]:
    """All characters as one string with a space before each that has one, and where each character stands in it."""
    codes = np.where((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF)), 0xFFFD, codes)
    with_spaces = np.insert(codes, np.flatnonzero(spaced), 32)
    place = np.arange(len(codes)) + np.cumsum(spaced)
    return with_spaces.astype("<u4").tobytes().decode("utf-32-le"), place.tolist()


def is_prose(text: str) -> bool:
    """Five words and more, most of them of letters: even an indented line of these begins or ends a paragraph."""
    tokens = text.split()
    words = sum(WORD.match(token.lstrip("(")) is not None for token in tokens)
    return len(tokens) >= 5 and words >= 0.6 * len(tokens)
