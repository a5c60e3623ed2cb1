"""Numbered display equations of a PDF: formulas that stand on rows of their own with a number at the column's right end."""

import re
from dataclasses import dataclass

from moexpand.data.pdf_captions import union
from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_paragraphs import Text
from moexpand.data.pdf_shapes import inside
from moexpand.data.pdf_text import Box, Line, is_prose
from moexpand.data.pdf_view import PageView

NUMBER = re.compile(r"^\(((?:[A-Z][.\-]?)?\d+(?:[.\-]\d+)*[a-z]?)\)$")
MAX_GAP = 0.7
"""Of the body's size: white between two rows of one formula."""
RIGHT = 6.0
"""Points that a number may stand off the column's right end."""
MARGIN = 2.0
"""Points of white kept around a formula."""


@dataclass
class Equation:
    """A numbered formula."""

    number: str
    page: int
    """From 0."""
    region: Box
    """Of the formula, without its number."""
    inner_text: str
    """The formula's characters in the order of their places."""
    context: list[str]
    """The paragraphs right before and after it."""


def find_equations(page: Page, style: Style, split: float | None, taken: list[Box], texts: list[Text]) -> list[Equation]:
    """The numbered equations of a page, from top to bottom, column by column.

    Args:
        page: without running heads; lines of figures and captions may be there or not.
        style: fonts and margins of the document.
        split: gutter of the page.
        taken: regions of figures and tables; nothing in them is an equation.
        texts: running text of the document.
    """
    view = PageView(page, style, split, [])
    free = [line for line in page.lines if not line.turn and not any(inside(line.box, box, 2.0) for box in taken)]
    numbers = [line for line in free if NUMBER.match(line.text) and _at_right(line, view)]
    found: list[Equation] = []
    for number in numbers:
        lines, above, below = _formula(number, numbers, free, view)
        match = NUMBER.match(number.text)
        if not lines or match is None or any(match.group(1) == other.number for other in found):
            continue
        x0, y0, x1, y1 = union([line.box for line in lines])
        # Fraction bars and roots are drawn.
        bars = [b for b in page.graphics if b[0] > x0 - 12 and b[2] < x1 + 12 and b[1] > y0 - 3 and b[3] < y1 + 3]
        x0, y0, x1, y1 = union([(x0, y0, x1, y1), *bars])
        # Boxes of large brackets are larger than their ink, and slanted letters reach out of theirs; white is trimmed.
        left, _ = view.margins(view.column(number))
        region = (min(left, x0) - MARGIN, max(y0 - MARGIN, above), number.x0 - 1.5, min(y1 + MARGIN, below))
        ordered = sorted(lines, key=lambda line: (round(line.middle / 6), line.x0))
        inner = " ".join(line.text for line in ordered)
        found.append(Equation(match.group(1), page.number, region, inner, _context(page, region, texts)))
    return found


def _at_right(number: Line, view: PageView) -> bool:
    """The number ends where its column's text ends."""
    return abs(number.x1 - view.margins(view.column(number))[1]) < RIGHT


def _formula(number: Line, numbers: list[Line], lines: list[Line], view: PageView) -> tuple[list[Line], float, float]:
    """The lines of the formula that a number belongs to, and the heights between which it must lie."""
    size = view.style.body_size
    x0, x1 = view.column(number)
    left, _ = view.margins((x0, x1))
    inside_column = [line for line in lines if line is not number and x0 - 2 < line.x0 and line.x1 < x1 + 2]
    prose = [line for line in inside_column if _is_prose(line, left, size)]
    above = max((line.y1 for line in prose if line.middle < number.middle), default=0.0)
    below = min((line.y0 for line in prose if line.middle > number.middle), default=view.page.height)
    if above > number.middle or below < number.middle:
        return [], above, below
    others = [other for other in numbers if other is not number and abs(other.x1 - number.x1) < RIGHT]
    for other in others:
        if other.middle < number.middle:
            above = max(above, (other.middle + number.middle) / 2)
        else:
            below = min(below, (other.middle + number.middle) / 2)
    parts = [
        line
        for line in inside_column
        if line not in prose
        and not NUMBER.match(line.text)
        and line.x1 < number.x0 + 1
        and above - 0.4 * size < line.middle < below + 0.4 * size
    ]
    # From the number's row outwards, as long as rows follow closely.
    low, high = number.y0, number.y1
    taken: list[Line] = []
    while True:
        near = [
            line for line in parts if line not in taken and line.y1 > low - MAX_GAP * size and line.y0 < high + MAX_GAP * size
        ]
        if not near:
            break
        taken += near
        low, high = min(low, *(line.y0 for line in near)), max(high, *(line.y1 for line in near))
    # A formula is set apart from the left margin, and stands in its number's row.
    beside = any(line.y0 - 0.8 * size < number.middle < line.y1 + 0.8 * size for line in taken)
    if not beside or min(line.x0 for line in taken) < left - 2:
        return [], above, below
    return taken, above, below


def _is_prose(line: Line, left: float, size: float) -> bool:
    """Running text or a heading: at the left margin, or several words in a row."""
    return (line.x0 - left < 0.6 * size and len(line.text) > 3) or is_prose(line.text) or line.mono


def _context(page: Page, region: Box, texts: list[Text]) -> list[str]:
    """The texts with the nearest prose above and below a region, in its column."""
    middle = (region[1] + region[3]) / 2
    before: tuple[float, str] | None = None
    after: tuple[float, str] | None = None
    for text in texts:
        if not is_prose(text.text):
            continue
        for line in text.lines:
            if line.page != page.number or line.x1 < region[0] or line.x0 > region[2] or not is_prose(line.text):
                continue
            away = line.middle - middle
            if away < 0 and (before is None or -away < before[0]):
                before = (-away, text.text)
            elif away >= 0 and (after is None or away < after[0]):
                after = (away, text.text)
    found = [side[1] for side in (before, after) if side is not None]
    return list(dict.fromkeys(found))
