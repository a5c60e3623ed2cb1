"""The habits of a document: fonts, margins, running heads, columns.

Everything is decided from the document's own habits: which fonts carry its text, which lines come back on page after page,
where a gap between columns stays free.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from moexpand.data.pdf_labels import CAPTION
from moexpand.data.pdf_text import Box, Line

HEAD_ZONE = 0.12
"""Fraction of the page's height, at the top and at the bottom, where running heads and page numbers stand."""

NEAR_DRAWING = 40.0
"""Points between the title of a plot and what is drawn below it, at most."""


@dataclass
class Page:
    """One page of the document."""

    number: int
    width: float
    height: float
    lines: list[Line]
    graphics: list[Box] = field(default_factory=list)
    """Boxes of paths, images and shadings."""
    turn: int = 0
    """1 or 3: most of its text is read upwards or downwards, and all places are given as if the page had been turned upright."""

    def as_shown(self, box: Box) -> Box:
        """A box of this page in the coordinates of the page as a viewer shows it."""
        x0, y0, x1, y1 = box
        if self.turn == 1:
            return (y0, self.width - x1, y1, self.width - x0)
        if self.turn == 3:
            return (self.height - y1, x0, self.height - y0, x1)
        return box


@dataclass(frozen=True)
class Style:
    """Fonts that carry the document's text."""

    body_size: float
    body_fonts: frozenset[str]
    """Fonts with at least 4 % of the characters."""
    margins: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    """Where text usually begins and ends, by column (page, left, right) and by page number odd or even."""


def document_style(pages: list[Page]) -> Style:
    """Size with most characters, and the fonts that are used throughout."""
    sizes: Counter[float] = Counter()
    fonts: Counter[str] = Counter()
    for page in pages:
        for line in page.lines:
            sizes[line.size] += len(line.text)
            fonts[line.font] += len(line.text)
    total = max(sum(fonts.values()), 1)
    body = sizes.most_common(1)[0][0] if sizes else 10.0
    return Style(body, frozenset(font for font, count in fonts.items() if count >= 0.04 * total))


def margins_of(pages: list[Page], columns: dict[int, float | None], style: Style) -> dict[tuple[str, int], tuple[float, float]]:
    """Usual left and right end of running text, by column and by page number odd or even: pages that face each other differ."""
    starts: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    ends: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for page in pages:
        split = columns[page.number]
        for line in page.lines:
            if line.font not in style.body_fonts or abs(line.size - style.body_size) > 0.6 or len(line.text) < 30 or line.turn:
                continue
            side = "page"
            if split is not None and not (line.x0 < split - 6 and line.x1 > split + 6):
                side = "left" if line.x0 < split else "right"
            starts[side, page.number % 2][round(line.x0)] += 1
            ends[side, page.number % 2][round(line.x1)] += 1
    usual = {}
    for key, counts in starts.items():
        left, count = min(counts.most_common(3), key=lambda item: (item[1] * 3 < counts.most_common(1)[0][1], item[0]))
        if count >= 5:
            usual[key] = (float(left), float(ends[key].most_common(1)[0][0]))
    return usual


def strip_running_heads(pages: list[Page]) -> None:
    """Remove lines at the top and bottom that come back: the same words (numbers aside) at the same height on several pages.

    Heads whose words change with the chapter are found by place: a height in the zone that many pages use and that is parted
    from the text by a gap. Rules that come back in the zone go with them.
    """
    if len(pages) < 3:
        return
    often = max(3, 0.3 * len(pages))
    zones = _zones(pages)
    pitch = _pitch(pages)
    repeats: Counter[tuple[str, int]] = Counter()
    alone: Counter[int] = Counter()
    rules: Counter[int] = Counter()
    plain: Counter[tuple[str, int]] = Counter()
    for page in pages:
        zone = [line for line in page.lines if _in_zone(line.box, zones)]
        repeats.update({(_pattern(line.text), _height(line.box)) for line in zone})
        plain.update({(_pattern(line.text), _height(line.box)) for line in zone if not _is_over_drawing(line, page)})
        alone.update({_height(line.box) for line in zone if _stands_apart(line, page, pitch)})
        rules.update({_height(box) for box in page.graphics if _is_rule(box, page) and _in_zone(box, zones)})

    def is_head(line: Line, page: Page) -> bool:
        if CAPTION.match(line.text):
            # Tables that begin pages have their captions at one height, too.
            return False
        height = _height(line.box)
        near = (height - 1, height, height + 1)
        pattern = _pattern(line.text)
        # Tables at the top of a few pages may have the same header row below the running head.
        least = 3 if _outermost(line, page) else often
        again = sum(repeats[pattern, y] for y in near)
        if again < often and _begins_block(line, page):
            return False
        if again < 0.7 * len(pages) and not sum(plain[pattern, y] for y in near):
            # The title of plots that begin several pages.
            return False
        return again >= least or sum(alone[y] for y in near) >= often

    for page in pages:
        page.lines = [line for line in page.lines if not (_in_zone(line.box, zones) and is_head(line, page))]
        page.graphics = [
            box for box in page.graphics if not (_is_rule(box, page) and _in_zone(box, zones) and rules[_height(box)] >= often)
        ]


def _zones(pages: list[Page]) -> tuple[float, float]:
    """Heads end above the first height and feet begin below the second; small type areas on large paper move both inwards."""
    filled = [page for page in pages if page.lines]
    height = sorted(page.height for page in pages)[len(pages) // 2]
    if not filled:
        return (HEAD_ZONE * height, (1 - HEAD_ZONE) * height)
    tops = sorted(min(line.y0 for line in page.lines) for page in filled)
    bottoms = sorted(max(line.y1 for line in page.lines) for page in filled)
    middle = len(filled) // 2
    return (
        max(HEAD_ZONE * height, tops[middle] + 0.03 * height),
        min((1 - HEAD_ZONE) * height, bottoms[middle] - 0.03 * height),
    )


def _in_zone(box: Box, zones: tuple[float, float]) -> bool:
    return box[3] < zones[0] or box[1] > zones[1]


def _is_over_drawing(line: Line, page: Page) -> bool:
    """Something other than a rule is drawn close below the line."""
    return any(
        -2 < box[1] - line.y1 < NEAR_DRAWING and box[0] < line.x1 and box[2] > line.x0 and not _is_rule(box, page)
        for box in page.graphics
    )


def _is_rule(box: Box, page: Page) -> bool:
    return box[3] - box[1] < 2 and box[2] - box[0] > 0.3 * page.width


def _height(box: Box) -> int:
    """Where a box stands, in steps of 3 points."""
    return round((box[1] + box[3]) / 6)


def _pattern(text: str) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", text)


def _pitch(pages: list[Page]) -> float:
    """Usual white between two lines, in points: in a document with double spacing a first line is no head."""
    gaps = [b.y0 - a.y1 for page in pages for a, b in pairwise(page.lines) if 0 < b.y0 - a.y1 < 3 * a.size]
    return sorted(gaps)[len(gaps) // 2] if gaps else 0.0


def _outermost(line: Line, page: Page) -> bool:
    """Nothing stands between this line and the page's edge."""
    top = line.middle < page.height / 2
    others = [other for other in page.lines if abs(other.middle - line.middle) > 0.6 * line.size and not other.turn]
    return all(other.middle > line.middle if top else other.middle < line.middle for other in others)


def _begins_block(line: Line, page: Page) -> bool:
    """Lines in its font and size follow from the same left edge at one pitch: code that begins like that of other pages."""
    same = sorted(
        other.y0
        for other in page.lines
        if other.font == line.font and abs(other.size - line.size) < 0.3 and abs(other.x0 - line.x0) < 1 and other.y0 > line.y0
    )
    return len(same) > 1 and same[0] - line.y0 < 1.4 * line.size and abs((same[1] - same[0]) - (same[0] - line.y0)) < 0.5


def _stands_apart(line: Line, page: Page, pitch: float) -> bool:
    """Nothing but lines of the same height lies between this line and the page's edge, and a gap parts it from the text."""
    top = line.middle < page.height / 2
    others = [other for other in page.lines if abs(other.middle - line.middle) > 0.6 * line.size and not other.turn]
    gap = max(0.8 * line.size, 1.4 * pitch)
    if top:
        return all(other.middle > line.middle and other.y0 - line.y1 > gap for other in others)
    return all(other.middle < line.middle and line.y0 - other.y1 > gap for other in others)


def gutters(pages: list[Page]) -> dict[int, float | None]:
    """x of the free strip between two columns of text, or None, by page number.

    A page that has too little text to show its columns (a large figure, the last page) has those of the document when half of
    the pages agree and few of its own lines cross the strip.
    """
    found = {page.number: _gutter(page) for page in pages}
    known = sorted(x for x in found.values() if x is not None)
    if len(known) * 2 < len(pages) or not known:
        return found
    usual = known[len(known) // 2]
    for page in pages:
        wide = _wide_lines(page)
        crossing = sum(line.x0 < usual - 6 and line.x1 > usual + 6 for line in wide)
        if found[page.number] is None and crossing <= 0.4 * len(wide):
            found[page.number] = usual
    return found


def _wide_lines(page: Page) -> list[Line]:
    return [line for line in page.lines if line.width > 0.2 * page.width and len(line.text) > 15]


def _gutter(page: Page) -> float | None:
    wide = _wide_lines(page)
    free: list[tuple[int, float]] = []
    for step in range(40, 61):
        x = page.width * step / 100
        left = [line for line in wide if line.x1 <= x + 1]
        right = [line for line in wide if line.x0 >= x - 1]
        crossing = len(wide) - len(left) - len(right)
        if min(len(left), len(right)) < 6 or crossing > 0.4 * len(wide):
            continue
        # The right column's lines start at one place; lines that begin anywhere are no column.
        starts = Counter(round(line.x0 / 4) for line in right)
        if starts.most_common(1)[0][1] < 0.35 * len(right):
            continue
        free.append((crossing, x))
    if not free:
        return None
    strip = [x for crossing, x in free if crossing == min(free)[0]]
    return (strip[0] + strip[-1]) / 2
