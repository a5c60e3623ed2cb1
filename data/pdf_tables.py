"""Which region of a page is the table above or below its caption."""

from itertools import pairwise

import numpy as np

from moexpand.data.pdf_bands import (
    FIRST_GAP,
    MARGIN,
    Region,
    band_of,
    between,
    clip,
    crosses_gutter,
    gap_of,
    in_band,
    rows_beside,
    to_caption,
)
from moexpand.data.pdf_captions import Caption, union
from moexpand.data.pdf_labels import CAPTION
from moexpand.data.pdf_shapes import RULE, inside, overlap
from moexpand.data.pdf_text import Box, Line
from moexpand.data.pdf_view import PageView

HEAD = 4.5
"""Font sizes that the head of a table is high at most."""
LEAST_PICTURE = 24.0
"""Points that a picture in a cell is high at least."""


def table_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """From the rule nearest to the caption to the last one before body text; without rules, the rows next to the caption.

    None where there are none: the table may be a picture.
    """
    band = band_of(caption, view, column, up, listings=True)
    ruled = ruled_stretch(caption, view, band, up)
    top, bottom = (0.0, caption.box[1]) if up else (caption.box[3], view.page.height)
    if ruled is not None:
        # Columns parted by vertical lines, with no rule above the header row or below the last one.
        ruled = union([ruled, *joined_verticals(ruled, view, (top, bottom))])
        ruled = with_last_row(with_heads(ruled, top, view), bottom, view)
        ruled = ruled if up else with_rows(ruled, bottom, view)
        held = [line.box for line in view.lines if in_band(line.box, ruled)]
        # A rule may lie so close to the caption that it touches its letters.
        top, bottom = (top, max(bottom, ruled[3] + 0.5)) if up else (min(top, ruled[1] - 0.5), bottom)
        x0, y0, x1, y1 = to_caption(union([ruled, *held]), (column[0], top, column[1], bottom), view, up)
        box = (x0 - MARGIN, max(y0 - MARGIN, top), x1 + MARGIN, min(y1 + MARGIN, bottom))
        return Region(box, 1.0, gap_of(box, caption, up))
    lines = [line for line in view.lines if in_band(line.box, band)]
    rows = rows_beside(caption, lines, up, 2.5 * view.style.body_size, FIRST_GAP * view.style.body_size)
    rows = _of_one_table(rows, up, 1.2 * view.style.body_size)
    if len(rows) < 2:
        return None
    hull = union([line.box for line in rows])
    marks = [(b[0], b[1], b[2], b[3]) for b in view.boxes.tolist() if hull[1] - 3 < (b[1] + b[3]) / 2 < hull[3] + 3]
    hull = union([hull, *(mark for mark in marks if in_band(mark, band))])
    box = clip(hull, band)
    return Region(box, 0.5, gap_of(box, caption, up))


def _of_one_table(rows: list[Line], up: bool, white: float) -> list[Line]:
    """The rows up to a gap in points beyond which another font begins: code, a heading, text in italics."""
    fonts: set[str] = set()
    for i, (last, line) in enumerate(pairwise(rows)):
        fonts.add(last.font)
        gap = last.y0 - line.y1 if up else line.y0 - last.y1
        if gap > white and line.font not in fonts:
            return rows[: i + 1]
    return rows


def with_heads(ruled: Box, top: float, view: PageView) -> Box:
    """With the header rows of a table that has no rule above them: rows of cells close above its first rule."""
    edge = ruled[1]
    walls = {id(line) for line in view.walls}
    for _ in range(4):
        row = [
            line
            for line in view.lines
            if -4 <= edge - line.y1 < 0.8 * line.size and line.y0 < edge and between(line.box, ruled) and line.y0 > top - 1
        ]
        if not row or (len(row) == 1 and id(row[0]) in walls):
            break
        edge = min(line.y0 for line in row)
    return (ruled[0], edge, ruled[2], ruled[3])


def with_last_row(ruled: Box, bottom: float, view: PageView) -> Box:
    """With the last row of a table whose rules stand above the rows: cells in a row below its last rule, at the rules' pitch."""
    rules = [rule for rule in view.rules if between(rule, ruled) and ruled[1] - 1 < rule[1] and rule[3] < ruled[3] + 1]
    heights = [(rule[1] + rule[3]) / 2 for rule in rules]
    if len(heights) < 4 or abs((heights[-1] - heights[-2]) - (heights[-2] - heights[-3])) > 2:
        return ruled
    pitch = heights[-1] - heights[-2]
    row = [line for line in view.lines if heights[-1] < line.middle < heights[-1] + pitch and line.y1 < bottom + 1]
    inside = [line for line in row if between(line.box, ruled)]
    if len(inside) < 2 or len(inside) < len(row):
        return ruled
    return (ruled[0], ruled[1], ruled[2], max(line.y1 for line in inside))


def with_rows(ruled: Box, bottom: float, view: PageView) -> Box:
    """With the rows below the only rules that a table has, those of its head: it goes on over the page or ends without a rule."""
    size = view.style.body_size
    if ruled[3] - ruled[1] > HEAD * size:
        return ruled
    walls = [box[1] for box in [*(caption.box for caption in view.captions), *view.rules] if box[1] > ruled[3] + 1]
    limit = min([bottom, *walls])
    below = sorted((line for line in view.lines if ruled[3] - 2 < line.y0 and line.middle < limit), key=lambda line: line.y0)
    rows: list[list[Line]] = []
    for line in below:
        if rows and line.y0 < max(other.y1 for other in rows[-1]) - 0.3 * line.size:
            rows[-1].append(line)
        else:
            rows.append([line])
    edge = end = ruled[3]
    cells = 0
    for row in rows:
        x0, top, x1, y1 = union([line.box for line in row])
        if top - edge > 1.2 * size or not between((x0, top, x1, y1), ruled):
            break
        edge = y1
        spans = sorted((line.x0, line.x1) for line in row)
        # A row of one cell counts when another row follows: notes stand below the last one.
        if any(after[0] - before[1] > size for before, after in pairwise(spans)):
            end, cells = y1, cells + 1
    heads = [line for line in view.lines if in_band(line.box, ruled)]
    under = [line for line in view.lines if ruled[3] < line.middle < end and between(line.box, ruled)]
    # The last row of a page may be the only one: its cells stand under those of the head.
    aligned = all(any(line.x0 < head.x1 and head.x0 < line.x1 for head in heads) for line in under)
    return (ruled[0], ruled[1], ruled[2], end) if cells > 1 or (cells and aligned and len(heads) > 1) else ruled


def joined_verticals(ruled: Box, view: PageView, limits: tuple[float, float]) -> list[Box]:
    """Vertical lines that are joined to a ruled stretch, piece by piece."""
    boxes = view.boxes
    lines = boxes[(boxes[:, 2] - boxes[:, 0] < RULE) & (boxes[:, 3] - boxes[:, 1] > 4)]
    lines = lines[
        (lines[:, 0] > ruled[0] - 4)
        & (lines[:, 2] < ruled[2] + 4)
        & (lines[:, 1] > limits[0] - 1)
        & (lines[:, 3] < limits[1] + 1)
    ]
    low, high = ruled[1], ruled[3]
    for _ in range(len(lines)):
        touching = lines[(lines[:, 1] < high + 1.5) & (lines[:, 3] > low - 1.5)]
        if not len(touching) or (touching[:, 1].min() >= low and touching[:, 3].max() <= high):
            break
        low, high = min(low, float(touching[:, 1].min())), max(high, float(touching[:, 3].max()))
    return [(ruled[0], low, ruled[2], high)]


def ruled_stretch(caption: Caption, view: PageView, band: Box, up: bool) -> Box | None:
    """The stretch between the outermost rules of a table; rows may look like body text, so the rules decide, not the band."""
    rules = [rule for rule in view.rules if band[0] - 2 <= (rule[0] + rule[2]) / 2 <= band[2] + 2]
    apart = crosses_gutter(np.array(rules).reshape(-1, 4), (band[0], band[2]), view)
    rules = [rule for rule, other in zip(rules, apart.tolist(), strict=True) if not other and not _is_of_drawing(rule, view)]
    first, last = caption.box[1] + 0.5 * caption.lines[0].size, caption.box[3] - 0.5 * caption.lines[0].size
    rules = [rule for rule in rules if (rule[3] < first if up else rule[1] > last)]
    rules.sort(key=lambda rule: -rule[3] if up else rule[1])
    if not rules:
        return None
    edge = rules[0][3] if up else rules[0][1]
    span = (band[0], min(edge, last), band[2], max(edge, first))
    between = [line for line in view.lines if in_band(line.box, span)]
    notes = bool(between) and all(line.size < view.style.body_size - 0.4 for line in between)
    if gap_of(rules[0], caption, up) > (100 if notes else 40):
        return None
    chosen = [rules[0]]
    widest = rules[0]
    pending: list[Box] = []
    for rule in rules[1:]:
        stretch = union([chosen[-1], rule])
        held = [line for line in view.page.lines if in_band(line.box, stretch)]
        if any(CAPTION.match(line.text) for line in held):
            break
        # White alone parts two tables of one width.
        empty = not held and not any(overlap(box, stretch) > 0 for box in view.clusters)
        if empty and stretch[3] - stretch[1] > 2.5 * view.style.body_size:
            break
        same = abs(rule[0] - widest[0]) < 8 and abs(rule[2] - widest[2]) < 8
        partial = rule[0] > widest[0] - 4 and rule[2] < widest[2] + 4
        if same or (len(chosen) == 1 and rule[0] < widest[0] + 4 and rule[2] > widest[2] - 4):
            chosen += [*pending, rule]
            widest = union([widest, rule])
            pending = []
        elif partial:
            pending.append(rule)
        else:
            break
    region = union(chosen)
    return region if region[3] - region[1] > 10 else None


def _is_of_drawing(rule: Box, view: PageView) -> bool:
    """Part of a picture in a cell: rows of another cell stand beside the picture, and are wider than the rule."""
    around = [box for box in view.clusters if inside(rule, box, 2.0) and box[3] - box[1] > LEAST_PICTURE]
    around = [box for box in around if box[2] - box[0] < 2 * (rule[2] - rule[0])]
    wide = [line for line in view.lines if line.width > rule[2] - rule[0]]
    return any(box[1] < line.middle < box[3] and (line.x1 < box[0] or line.x0 > box[2]) for box in around for line in wide)
