"""Figures and tables of a PDF by their captions: which lines are captions, and which region of the page each belongs to.

Science PDFs draw their figures as paths, hardly ever as embedded pictures, so a figure is a region to render: what is drawn
between a caption and the nearest body text. The idea of voting on the document's caption style is that of pdffigures2
(Clark and Divvala, 2016); the code is our own.
"""

import re
from collections import Counter
from dataclasses import dataclass

from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_text import Box, Line

CAPTION = re.compile(r"^(fig(?:ure|\.)?|tab(?:le|\.)?)\s*((?:[A-Z]\.?)?\d+(?:[.\-]\d+)*)\s*([:.|\u2014\u2013]?)(?=\s|$)", re.I)
MAX_CAPTION_LINES = 25
MARGIN = 3.0
"""Points of white kept around a region."""


@dataclass
class Caption:
    """A caption and, once it is found, the region that it belongs to."""

    kind: str
    """figure or table."""
    number: str
    page: int
    lines: list[Line]
    box: Box
    region: Box | None = None


def union(boxes: list[Box]) -> Box:
    """Smallest box around all of them."""
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def find_captions(pages: list[Page], columns: dict[int, float | None]) -> list[Caption]:
    """All captions, in the style that most of the document's numbered ones have; each number once.

    Args:
        pages: without running heads.
        columns: gutter of each page, by page number.
    """
    candidates: list[tuple[str, str, str, Page, int]] = []
    for page in pages:
        for i, line in enumerate(page.lines):
            if (match := CAPTION.match(line.text)) and not _continues_text(page, i):
                kind = "figure" if match.group(1).lower().startswith("fig") else "table"
                candidates.append((kind, match.group(2), match.group(3), page, i))
    captions: list[Caption] = []
    for kind in ("figure", "table"):
        styles: dict[str, set[str]] = {}
        for found, number, mark, _, _ in candidates:
            if found == kind:
                styles.setdefault(mark, set()).add(number)
        # A bare "Figure 3 shows" begins many sentences: without a mark it is a caption only where no style has marks.
        marked = {mark: numbers for mark, numbers in styles.items() if mark}
        if not marked:
            continue
        style = max(marked, key=lambda mark: len(marked[mark]))
        taken: set[str] = set()
        for found, number, mark, page, i in candidates:
            if found == kind and mark == style and number not in taken:
                taken.add(number)
                lines = _caption_lines(page, i, columns[page.number])
                captions.append(Caption(kind, number, page.number, lines, union([line.box for line in lines])))
    return sorted(captions, key=lambda caption: (caption.page, caption.box[1], caption.box[0]))


def _continues_text(page: Page, i: int) -> bool:
    """The line before, close above and as wide, is running text: "see\nFigure 3." is no caption."""
    line = page.lines[i]
    for other in page.lines:
        step = line.y0 - other.y0
        if 0.5 * line.size < step < 1.35 * line.size and abs(other.size - line.size) < 0.3 and abs(other.x0 - line.x0) < 2:
            return other.width > 0.3 * page.width and not other.mono
    return False


def _caption_lines(page: Page, first: int, split: float | None) -> list[Line]:
    """The caption's first line and those that follow at its pitch, in its size and column."""
    head = page.lines[first]
    lines = [head]
    rest = sorted((line for line in page.lines if line is not head and line.y1 > head.y0), key=lambda line: (line.y0, line.x0))
    bottom, pitch = head.y1, None
    across = split is not None and head.x0 < split - 6 and head.x1 > split + 6
    for line in rest:
        if len(lines) >= MAX_CAPTION_LINES or line.y0 - bottom > 0.75 * head.size:
            break
        same_column = split is None or across or (line.x0 < split) == (head.x0 < split)
        if not same_column or line.x1 < head.x0 - 2 * head.size:
            continue
        same_row = min(line.y1, lines[-1].y1) - max(line.y0, lines[-1].y0) > 0.3 * line.size
        if same_row:
            lines.append(line)
            bottom = max(bottom, line.y1)
            continue
        step = line.y0 - lines[-1].y0
        if line.mono != head.mono or line.size > head.size + 0.6 or CAPTION.match(line.text):
            break
        if pitch is not None and step > 1.25 * pitch:
            break
        pitch = step if pitch is None and line.size == head.size else pitch
        lines.append(line)
        bottom = max(bottom, line.y1)
    return lines


def find_regions(captions: list[Caption], pages: list[Page], style: Style, columns: dict[int, float | None]) -> None:
    """Set the region of every caption that has one beside it.

    A figure usually stands above its caption; for tables documents differ, so the tables with something on one side only
    decide where the others are looked for.
    """
    by_number = {page.number: page for page in pages}
    sides: dict[int, tuple[Box | None, Box | None]] = {}
    for i, caption in enumerate(captions):
        neighbours = [other for other in captions if other.page == caption.page]
        sides[i] = _candidates(caption, by_number[caption.page], neighbours, style, columns[caption.page])
    votes = [
        above is not None
        for i, (above, below) in sides.items()
        if captions[i].kind == "table" and (above is None) != (below is None)
    ]
    tables_above = sum(votes) * 2 > len(votes)
    for i, caption in enumerate(captions):
        above, below = sides[i]
        first, second = (above, below) if caption.kind == "figure" or tables_above else (below, above)
        if first is None or (second is not None and _area(first) < 0.4 * _area(second) and caption.kind == "figure"):
            first = second
        caption.region = first


def _candidates(
    caption: Caption, page: Page, captions: list[Caption], style: Style, split: float | None
) -> tuple[Box | None, Box | None]:
    """The regions above and below a caption that could be its own; `captions` are those of the page."""
    column = _column(caption, page, split)
    above = _free_band(caption, page, captions, style, column, up=True)
    below = _free_band(caption, page, captions, style, column, up=False)
    if caption.kind == "table":
        return _table_region(above, page, caption, style), _table_region(below, page, caption, style)
    return _figure_region(above, page, caption), _figure_region(below, page, caption)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _column(caption: Caption, page: Page, split: float | None) -> tuple[float, float]:
    """Left and right end of the part of the page in which the caption's figure stands."""
    if split is None or (caption.box[0] < split - 6 and caption.box[2] > split + 6):
        return (0.0, page.width)
    # A short caption in one column may belong to a figure across both: what crosses the gutter beside it tells.
    wide = [b for b in page.graphics if b[0] < split - 12 and b[2] > split + 12 and b[3] - b[1] > 36]
    centred = abs((caption.box[0] + caption.box[2]) / 2 - page.width / 2) < 0.06 * page.width
    if wide and centred:
        return (0.0, page.width)
    return (0.0, split) if caption.box[0] < split else (split, page.width)


def _free_band(caption: Caption, page: Page, captions: list[Caption], style: Style, column: tuple[float, float], up: bool) -> Box:
    """The strip between the caption and the nearest body text, other caption or page edge."""
    x0, x1 = column
    own = {id(line) for line in caption.lines}
    walls = [other.box for other in captions if other is not caption]
    body = [line for line in page.lines if id(line) not in own and is_body(line, page, style, column)]
    walls += [line.box for line in body]
    walls = [box for box in walls if box[2] > x0 + 2 and box[0] < x1 - 2]
    if up:
        edge = max((box[3] for box in walls if (box[1] + box[3]) / 2 < caption.box[1]), default=0.02 * page.height)
        return (x0, edge, x1, caption.box[1])
    edge = min((box[1] for box in walls if (box[1] + box[3]) / 2 > caption.box[3]), default=0.98 * page.height)
    return (x0, caption.box[3], x1, edge)


def is_body(line: Line, page: Page, style: Style, column: tuple[float, float]) -> bool:
    """A line of running text or of a listing: the document's own font, and wide or at the column's left edge."""
    if line.font not in style.body_fonts or line.size < 0.7 * style.body_size:
        return False
    if not line.mono and abs(line.size - style.body_size) > 0.6:
        return False
    inside = [other for other in page.lines if column[0] - 2 <= other.x0 and other.x1 <= column[1] + 2]
    starts = Counter(round(other.x0) for other in inside if other.font in style.body_fonts)
    left = min((x for x, count in starts.items() if count >= 3), default=round(line.x0))
    width = max((other.x1 for other in inside), default=page.width) - left
    at_left = abs(line.x0 - left) < 3
    wide = line.width > 0.55 * width
    return (wide and line.x0 - left < 0.2 * width) or (at_left and (line.mono or len(line.text) > 8))


def _inside(box: Box, band: Box, part: float = 0.6) -> bool:
    """At least `part` of the box's height lies in the band, and its middle between the band's sides."""
    height = max(box[3] - box[1], 0.1)
    shared = min(box[3], band[3]) - max(box[1], band[1])
    return shared >= part * height - 0.1 and band[0] - 2 <= (box[0] + box[2]) / 2 <= band[2] + 2


def _figure_region(band: Box, page: Page, caption: Caption) -> Box | None:
    """What is drawn in the band, with the text that belongs to it."""
    page_area = page.width * page.height
    drawn = [b for b in page.graphics if _inside(b, band) and _area(b) < 0.8 * page_area]
    # A lone rule is a separator, not a figure.
    if not any(b[3] - b[1] > 8 and b[2] - b[0] > 8 for b in drawn) and len(drawn) < 8:
        return None
    hull = union(drawn)
    own = {id(line) for line in caption.lines}
    labels = [line.box for line in page.lines if id(line) not in own and _inside(line.box, band)]
    # Labels stand in the drawing or close to it; the rest is stray text.
    near = [b for b in labels if b[3] > hull[1] - 30 and b[1] < hull[3] + 30]
    return _clip(union([hull, *near]), band)


def _table_region(band: Box, page: Page, caption: Caption, style: Style) -> Box | None:
    """From the rule nearest to the caption to the last one before body text; without rules, the rows next to the caption."""
    own = {id(line) for line in caption.lines}
    rows = [line for line in page.lines if id(line) not in own and _inside(line.box, band)]
    wall = band[3] if band[1] >= caption.box[3] - 1 else band[1]
    reach = _ruled_band(caption, page, band, below=band[1] >= caption.box[3] - 1)
    if reach is not None:
        # Some tables have no rule above their header row.
        heads = [
            line.box
            for line in page.lines
            if id(line) not in own and -1 <= reach[1] - line.y1 < 0.5 * line.size and _between(line.box, reach)
        ]
        reach = union([reach, *heads])
        ruled = [line.box for line in page.lines if id(line) not in own and _inside(line.box, reach)]
        x0, y0, x1, y1 = union([reach, *ruled])
        top, bottom = (caption.box[3], page.height) if wall == band[3] else (0.0, caption.box[1])
        return (x0 - MARGIN, max(y0 - MARGIN, top), x1 + MARGIN, min(y1 + MARGIN, bottom))
    near: list[Box] = []
    edge = caption.box[3] if wall == band[3] else caption.box[1]
    ordered = sorted(rows, key=lambda line: abs(line.middle - edge))
    for line in ordered:
        gap = line.y0 - edge if wall == band[3] else edge - line.y1
        if gap > 2.5 * style.body_size:
            break
        near.append(line.box)
        edge = max(edge, line.y1) if wall == band[3] else min(edge, line.y0)
    if len(near) < 2:
        return None
    return _clip(union(near), band)


def _between(box: Box, region: Box) -> bool:
    """Between the left and the right end of the region."""
    return box[0] > region[0] - 4 and box[2] < region[2] + 4


def _ruled_band(caption: Caption, page: Page, band: Box, below: bool) -> Box | None:
    """The stretch between the outermost rules of a table; rows may look like body text, so the rules decide, not the band."""
    rules = [
        b for b in page.graphics if b[3] - b[1] < 2.5 and b[2] - b[0] > 60 and band[0] - 2 <= (b[0] + b[2]) / 2 <= band[2] + 2
    ]
    rules = [b for b in rules if (b[1] > caption.box[3] - 2 if below else b[3] < caption.box[1] + 2)]
    rules.sort(key=lambda b: b[1] if below else -b[3])
    edge = caption.box[3] if below else caption.box[1]
    if not rules or abs((rules[0][1] if below else rules[0][3]) - edge) > 40:
        return None
    chosen = [rules[0]]
    for rule in rules[1:]:
        between = union([chosen[-1], rule])
        same_width = abs(rule[0] - rules[0][0]) < 8 and abs(rule[2] - rules[0][2]) < 8
        partial = rule[0] > rules[0][0] - 4 and rule[2] < rules[0][2] + 4
        captioned = any(CAPTION.match(line.text) for line in page.lines if _inside(line.box, between))
        if not (same_width or partial) or captioned:
            break
        chosen.append(rule)
    region = union(chosen)
    return region if region[3] - region[1] > 10 else None


def _clip(box: Box, band: Box) -> Box:
    return (
        max(box[0] - MARGIN, band[0]),
        max(box[1] - MARGIN, band[1]),
        min(box[2] + MARGIN, band[2]),
        min(box[3] + MARGIN, band[3]),
    )
