"""Which region of a page belongs to each caption.

Science PDFs draw their figures as paths, hardly ever as embedded pictures, so a figure is a region to render: what is drawn
between a caption and the nearest wall (running text, another caption, the page's edge), with the labels that belong to it. Where
nothing is drawn it may be a listing, framed or not. Tables reach from rule to rule, or over the rows beside their caption.
"""

from dataclasses import dataclass

import numpy as np

from moexpand.data.pdf_captions import CAPTION, Caption, union
from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_text import Box, Line
from moexpand.data.pdf_view import RULE, PageView, area, inside, overlap, stacked

MARGIN = 3.0
"""Points of white kept around a region."""
FIRST_GAP = 4.0
"""Font sizes between a caption and the rows that belong to it, at most."""


@dataclass(frozen=True)
class _Region:
    """A region that a caption could have."""

    box: Box
    weight: float
    """How sure it is that this is a figure or table: drawings 1, listings and rows less."""
    gap: float
    """Points between caption and region."""


def find_regions(captions: list[Caption], pages: list[Page], style: Style, columns: dict[int, float | None]) -> None:
    """Set the region of every caption that has one beside it.

    Documents keep to one side: captions with something on one side only decide where the others are looked for, figures above
    their captions and tables below where nothing tells. No two captions share a region.
    """
    by_page: dict[int, list[Caption]] = {}
    for caption in captions:
        by_page.setdefault(caption.page, []).append(caption)
    options: dict[int, tuple[_Region | None, _Region | None]] = {}
    for page in pages:
        own = by_page.get(page.number, [])
        if own:
            view = PageView(page, style, columns[page.number], own)
            for caption in own:
                options[id(caption)] = _candidates(caption, view)
    for kind, usual in (("figure", True), ("table", False)):
        of_kind = [caption for caption in captions if caption.kind == kind]
        above = _mostly_above([options[id(caption)] for caption in of_kind], usual)
        for own in by_page.values():
            _choose([caption for caption in own if caption.kind == kind], options, above)


def _mostly_above(options: list[tuple[_Region | None, _Region | None]], usual: bool) -> bool:
    """The side on which a kind's regions stand, by those that have one side only."""
    votes = sum((above is not None) - (below is not None) for above, below in options if (above is None) != (below is None))
    return usual if votes == 0 else votes > 0


def _choose(captions: list[Caption], options: dict[int, tuple[_Region | None, _Region | None]], above: bool) -> None:
    """Give the captions of one kind and page their regions: those without a choice first, the preferred side next.

    A caption whose region is taken has none: a picture with another's caption is worse than no picture.
    """

    def preferred(caption: Caption) -> list[_Region]:
        up, down = options[id(caption)]
        first, second = (up, down) if above else (down, up)
        if first is not None and second is not None and caption.kind == "figure":
            # Some mark on the usual side, and the drawing on the other.
            mark = first.box[3] - first.box[1] < 45 and first.weight <= second.weight
            if mark and area(first.box) < 0.4 * area(second.box):
                first, second = second, first
        if first is not None and second is not None and first.weight < 1 <= second.weight:
            # Lines of text on the usual side, a drawing or rules on the other.
            first, second = second, first
        return [region for region in (first, second) if region is not None]

    def rank(caption: Caption) -> tuple[int, bool]:
        return len(preferred(caption)), options[id(caption)][0 if above else 1] is None

    taken: list[Box] = []
    for caption in sorted(captions, key=rank):
        ways = preferred(caption)
        free = [way for way in ways if all(overlap(way.box, other) < 0.3 * min(area(way.box), area(other)) for other in taken)]
        if free:
            caption.region = free[0].box
            taken.append(caption.region)


def _candidates(caption: Caption, view: PageView) -> tuple[_Region | None, _Region | None]:
    """The regions above and below a caption that could be its own; one beside it stands for both."""
    column = _column(caption, view)
    find = _table_region if caption.kind == "table" else _figure_region
    above, below = find(caption, view, column, True), find(caption, view, column, False)
    beside = _beside(caption, view, column)
    if beside is not None and all(one is None or overlap(one.box, beside.box) > 0.3 * area(one.box) for one in (above, below)):
        return beside, None
    return above, below


def _beside(caption: Caption, view: PageView, column: tuple[float, float]) -> _Region | None:
    """A drawing left or right of a caption, as high as it or higher."""
    x0, y0, x1, y1 = caption.box
    found: Box | None = None
    for box in view.clusters:
        shared = min(box[3], y1) - max(box[1], y0)
        apart = max(x0 - box[2], box[0] - x1)
        if (
            not column[0] < (box[0] + box[2]) / 2 < column[1]
            or not 0 < apart < 0.25 * view.page.width
            or shared < 0.6 * (y1 - y0)
        ):
            continue
        if min(box[2] - box[0], box[3] - box[1]) > 36 and (found is None or area(box) > area(found)):
            found = box
    if found is None:
        return None
    # Clusters are known to a few points; their drawings exactly.
    own = view.boxes[(view.boxes[:, :2] >= found[:2]).all(axis=1) & (view.boxes[:, 2:] <= found[2:]).all(axis=1)]
    (left, top), (right, bottom) = own[:, :2].min(axis=0).tolist(), own[:, 2:].max(axis=0).tolist()
    found = (left, top, right, bottom)
    band = (column[0], found[1] - 12, x0, found[3] + 12) if found[0] < x0 else (x1, found[1] - 12, column[1], found[3] + 12)
    return _Region(_clip(_with_labels(found, band, view), band), 1.0, 0.0)


def _column(caption: Caption, view: PageView) -> tuple[float, float]:
    """Left and right end of the part of the page in which the caption's region stands."""
    page, split, box = view.page, view.split, caption.box
    left, right = 0.0, page.width
    if split is not None and not (box[0] < split - 6 and box[2] > split + 6):
        # A short caption in one column may belong to a figure across both: what crosses the gutter beside it tells.
        wide = [b for b in view.clusters if b[0] < split - 12 and b[2] > split + 12 and b[3] - b[1] > 36]
        centred = abs((box[0] + box[2]) / 2 - page.width / 2) < 0.06 * page.width
        if not (wide and centred):
            left, right = (0.0, split) if box[0] < split else (split, page.width)
    # Captions beside this one.
    for other in view.captions:
        if other is caption or min(other.box[3], box[3]) - max(other.box[1], box[1]) < 0.5 * caption.lines[0].size:
            continue
        if box[2] <= other.box[0] + 2 and other.box[0] < right:
            right = min(right, (box[2] + other.box[0]) / 2)
        if other.box[2] <= box[0] + 2 and other.box[2] > left:
            left = max(left, (other.box[2] + box[0]) / 2)
    return left, right


def _band(caption: Caption, view: PageView, column: tuple[float, float], up: bool, listings: bool) -> Box:
    """The strip between the caption and the nearest wall or page edge; `listings`: monospaced lines are walls, too."""
    x0, x1 = column
    walls = [other.box for other in view.captions if other is not caption]
    walls += [line.box for line in view.walls if listings or not (line.mono or _framed(line, view))]
    walls = [box for box in walls if box[2] > x0 + 2 and box[0] < x1 - 2]
    middle = (caption.box[1] + caption.box[3]) / 2
    if up:
        edge = max((box[3] for box in walls if (box[1] + box[3]) / 2 < middle), default=0.0)
        return (x0, min(edge, caption.box[1]), x1, caption.box[1])
    edge = min((box[1] for box in walls if (box[1] + box[3]) / 2 > middle), default=view.page.height)
    return (x0, caption.box[3], x1, max(edge, caption.box[3]))


def _framed(line: Line, view: PageView) -> bool:
    return any(inside(line.box, frame, 2.0) for frame in view.frames)


def _in_band(box: Box, band: Box, part: float = 0.6) -> bool:
    """At least `part` of the box's height lies in the band, and its middle between the band's sides."""
    height = max(box[3] - box[1], 0.1)
    shared = min(box[3], band[3]) - max(box[1], band[1])
    return shared >= part * height - 0.1 and band[0] - 2 <= (box[0] + box[2]) / 2 <= band[2] + 2


def _gap(box: Box, caption: Caption, up: bool) -> float:
    return caption.box[1] - box[3] if up else box[1] - caption.box[3]


def _figure_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> _Region | None:
    """What is drawn beside the caption with its labels; else a listing or a block of text that is no running text."""
    framed = _framed_region(caption, view, column, up)
    if framed is not None and framed.box[2] - framed.box[0] > 0.45 * (column[1] - column[0]):
        # The boxes of a diagram hold text, too: what is drawn beside them goes over the frames' sides then.
        middle = (view.boxes[:, 1] + view.boxes[:, 3]) / 2
        beside = view.boxes[(middle > framed.box[1]) & (middle < framed.box[3])]
        beside = beside[(beside[:, 2] > column[0]) & (beside[:, 0] < column[1])]
        if not len(beside) or (beside[:, 0].min() > framed.box[0] - 12 and beside[:, 2].max() < framed.box[2] + 12):
            return framed
    band = _band(caption, view, column, up, listings=True)
    boxes = view.boxes
    height = (boxes[:, 3] - boxes[:, 1]).clip(0.1)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    shared = boxes[:, 3].clip(None, band[3]) - boxes[:, 1].clip(band[1], None)
    drawn = boxes[(shared >= 0.6 * height - 0.1) & (middle >= band[0] - 2) & (middle <= band[2] + 2)]
    # The last rule of a frame around the text before the figure.
    for frame in view.frames:
        if not _in_band(frame, band):
            drawn = drawn[~((drawn[:, :2] > np.array(frame[:2]) - 2) & (drawn[:, 2:] < np.array(frame[2:]) + 2)).all(axis=1)]
    solid = ((drawn[:, 3] - drawn[:, 1] > 8) & (drawn[:, 2] - drawn[:, 0] > 8)).any()
    # A lone rule is a separator, not a figure.
    if solid or len(drawn) >= 8:
        low, high = drawn[:, :2].min(axis=0), drawn[:, 2:].max(axis=0)
        hull = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        box = _clip(_to_caption(_with_labels(hull, band, view), band, view, up), band)
        return _Region(box, 1.0, _gap(box, caption, up))
    return _listing_region(caption, view, column, up)


def _with_labels(hull: Box, band: Box, view: PageView) -> Box:
    """The drawing and the text in it and close to it; text in the fonts of running text must be closer than labels."""
    labels = [line for line in view.lines if _in_band(line.box, band)]
    for _ in range(4):
        near = []
        for line in labels:
            reach = 12.0 if line.font in view.style.body_fonts and line.size >= view.style.body_size - 0.6 else 30.0
            if line.y1 > hull[1] - reach and line.y0 < hull[3] + reach:
                near.append(line.box)
        grown = union([hull, *near])
        if grown == hull:
            break
        hull = grown
    return hull


def _to_caption(hull: Box, band: Box, view: PageView, up: bool) -> Box:
    """With all that stands between a drawing and its caption: labels of panels, notes."""
    labels = [line.box for line in view.lines if _in_band(line.box, band)]
    between = [box for box in labels if (box[3] > hull[3] if up else box[1] < hull[1])]
    return union([hull, *between])


def _listing_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> _Region | None:
    """A frame, rules or nothing around lines that are set as a block next to the caption."""
    framed = _framed_region(caption, view, column, up)
    if framed is not None:
        return framed
    band = _band(caption, view, column, up, listings=False)
    lines = [line for line in view.lines if _in_band(line.box, band) and not line.turn]
    ruled = _ruled(caption, view, band, up)
    if ruled is not None and any(inside(line.box, ruled, 4.0) for line in lines):
        box = _clip(ruled, band)
        return _Region(box, 0.8, _gap(box, caption, up))
    rows = _rows_beside(caption, lines, up, 2.5 * view.style.body_size, FIRST_GAP * view.style.body_size)
    mono = [line for line in rows if line.mono]
    if len(rows) < 2 or len(mono) * 2 < len(rows):
        return None
    rules = [rule for rule in view.rules if _in_band(rule, band)]
    hull = union([line.box for line in rows])
    hull = union([hull, *(rule for rule in rules if -8 < hull[1] - rule[3] < 8 or -8 < rule[1] - hull[3] < 8)])
    box = _clip(hull, band)
    return _Region(box, 0.5, _gap(box, caption, up))


def _framed_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> _Region | None:
    """A frame with text in it right beside the caption, with what stands beside its lines, such as their numbers."""
    band = _band(caption, view, column, up, listings=False)
    frames = [frame for frame in view.frames if overlap(frame, band) > 0.6 * area(frame)]
    near = [frame for frame in frames if _gap(frame, caption, up) < 3 * view.style.body_size]
    if not near:
        return None
    frame = union(near)
    # Shades are often drawn in pieces, one above the other.
    for _ in frames:
        frame = union([frame, *(other for other in frames if stacked(other, frame, 1.5 * view.style.body_size))])
    beside = [line.box for line in view.lines if frame[1] - 2 < line.middle < frame[3] + 2 and _in_band(line.box, band)]
    box = _clip(union([frame, *beside]), band)
    return _Region(box, 0.8, _gap(box, caption, up))


def _rows_beside(caption: Caption, lines: list[Line], up: bool, reach: float, first: float | None = None) -> list[Line]:
    """Lines that follow each other from the caption on without a gap above `reach` points; the first above `first` points."""
    edge = caption.box[1] if up else caption.box[3]
    found: list[Line] = []
    for line in sorted(lines, key=lambda line: -line.y1 if up else line.y0):
        gap = edge - line.y1 if up else line.y0 - edge
        if gap > (reach if found or first is None else first):
            break
        found.append(line)
        edge = min(edge, line.y0) if up else max(edge, line.y1)
    return found


def _table_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> _Region | None:
    """From the rule nearest to the caption to the last one before body text; without rules, the rows next to the caption."""
    band = _band(caption, view, column, up, listings=True)
    ruled = _ruled(caption, view, band, up)
    top, bottom = (0.0, caption.box[1]) if up else (caption.box[3], view.page.height)
    if ruled is not None:
        # Columns parted by vertical lines, with no rule above the header row or below the last one.
        ruled = union([ruled, *_verticals(ruled, view, (top, bottom))])
        ruled = _with_heads(ruled, top, view)
        held = [line.box for line in view.lines if _in_band(line.box, ruled)]
        # A rule may lie so close to the caption that it touches its letters.
        top, bottom = (top, max(bottom, ruled[3] + 0.5)) if up else (min(top, ruled[1] - 0.5), bottom)
        x0, y0, x1, y1 = _to_caption(union([ruled, *held]), (column[0], top, column[1], bottom), view, up)
        box = (x0 - MARGIN, max(y0 - MARGIN, top), x1 + MARGIN, min(y1 + MARGIN, bottom))
        return _Region(box, 1.0, _gap(box, caption, up))
    lines = [line for line in view.lines if _in_band(line.box, band)]
    rows = _rows_beside(caption, lines, up, 2.5 * view.style.body_size, FIRST_GAP * view.style.body_size)
    if len(rows) < 2:
        region = _figure_region(caption, view, column, up)
        return None if region is None else _Region(region.box, 0.6 * region.weight, region.gap)
    hull = union([line.box for line in rows])
    marks = [(b[0], b[1], b[2], b[3]) for b in view.boxes.tolist() if hull[1] - 3 < (b[1] + b[3]) / 2 < hull[3] + 3]
    hull = union([hull, *(mark for mark in marks if _in_band(mark, band))])
    box = _clip(hull, band)
    return _Region(box, 0.5, _gap(box, caption, up))


def _with_heads(ruled: Box, top: float, view: PageView) -> Box:
    """With the header rows of a table that has no rule above them: rows of cells close above its first rule."""
    edge = ruled[1]
    walls = {id(line) for line in view.walls}
    for _ in range(4):
        row = [
            line
            for line in view.lines
            if -4 <= edge - line.y1 < 0.8 * line.size and line.y0 < edge and _between(line.box, ruled) and line.y0 > top - 1
        ]
        if not row or (len(row) == 1 and id(row[0]) in walls):
            break
        edge = min(line.y0 for line in row)
    return (ruled[0], edge, ruled[2], ruled[3])


def _verticals(ruled: Box, view: PageView, limits: tuple[float, float]) -> list[Box]:
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


def _between(box: Box, region: Box) -> bool:
    """Between the left and the right end of the region."""
    return box[0] > region[0] - 4 and box[2] < region[2] + 4


def _ruled(caption: Caption, view: PageView, band: Box, up: bool) -> Box | None:
    """The stretch between the outermost rules of a table; rows may look like body text, so the rules decide, not the band."""
    rules = [rule for rule in view.rules if band[0] - 2 <= (rule[0] + rule[2]) / 2 <= band[2] + 2]
    first, last = caption.box[1] + 0.5 * caption.lines[0].size, caption.box[3] - 0.5 * caption.lines[0].size
    rules = [rule for rule in rules if (rule[3] < first if up else rule[1] > last)]
    rules.sort(key=lambda rule: -rule[3] if up else rule[1])
    if not rules:
        return None
    edge = rules[0][3] if up else rules[0][1]
    span = (band[0], min(edge, last), band[2], max(edge, first))
    between = [line for line in view.lines if _in_band(line.box, span)]
    notes = bool(between) and all(line.size < view.style.body_size - 0.4 for line in between)
    if _gap(rules[0], caption, up) > (100 if notes else 40):
        return None
    chosen = [rules[0]]
    widest = rules[0]
    pending: list[Box] = []
    for rule in rules[1:]:
        stretch = union([chosen[-1], rule])
        if any(CAPTION.match(line.text) for line in view.page.lines if _in_band(line.box, stretch)):
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


def _clip(box: Box, band: Box) -> Box:
    """The box with its margin, within the band; what reaches over the band's sides stays whole."""
    return (
        min(box[0], max(box[0] - MARGIN, band[0])),
        max(box[1] - MARGIN, band[1]),
        max(box[2], min(box[2] + MARGIN, band[2])),
        min(box[3] + MARGIN, band[3]),
    )
