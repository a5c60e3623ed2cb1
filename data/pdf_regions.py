"""Which region of a page belongs to each caption.

Science PDFs draw their figures as paths, hardly ever as embedded pictures, so a figure is a region to render: what is drawn
between a caption and the nearest wall (running text, another caption, the page's edge), with the labels that belong to it. Where
nothing is drawn it may be a listing, framed or not, or rows of letters. Tables: pdf_tables.py; captions beside something:
pdf_beside.py; how far left and right a caption's region may reach: pdf_columns.py.
"""

import numpy as np

from moexpand.data.pdf_bands import (
    FIRST_GAP,
    MARGIN,
    Region,
    band_of,
    clip,
    crosses_gutter,
    gap_of,
    in_band,
    off_caption,
    rows_beside,
    to_caption,
    with_labels,
)
from moexpand.data.pdf_beside import region_beside
from moexpand.data.pdf_captions import Caption, union
from moexpand.data.pdf_columns import column_of
from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_shapes import Boxes, area, inside, overlap, stacked
from moexpand.data.pdf_tables import ruled_stretch, table_region
from moexpand.data.pdf_text import Box, is_prose
from moexpand.data.pdf_view import PageView

SOLID = 8.0
"""Points from which a drawing that is as wide and as high is more than a rule."""
NEAR_RULE = 12.0
"""Points between a rule and the figure that it belongs to."""
LEAST_WEIGHT = 0.5
"""Of a region above or below a caption that may be preferred to a drawing beside it."""


def find_regions(captions: list[Caption], pages: list[Page], style: Style, columns: dict[int, float | None]) -> None:
    """Set the region of every caption that has one beside it.

    Documents keep to one side: captions with something on one side only decide where the others are looked for, figures above
    their captions and tables below where nothing tells. No two captions share a region.
    """
    by_page: dict[int, list[Caption]] = {}
    for caption in captions:
        by_page.setdefault(caption.page, []).append(caption)
    options: dict[int, tuple[Region | None, Region | None]] = {}
    for page in pages:
        own = by_page.get(page.number, [])
        if own:
            view = PageView(page, style, columns[page.number], own)
            for caption in sorted(own, key=lambda caption: caption.kind == "figure"):
                options[id(caption)] = _candidates(caption, view)
                sure = [way for way in options[id(caption)] if way is not None]
                # The rules of a table tell where it ends, what is drawn for a figure does not.
                if caption.kind == "table" and len(sure) == 1:
                    view.taken.append(sure[0].box)
    for kind, usual in (("figure", True), ("table", False)):
        of_kind = [caption for caption in captions if caption.kind == kind]
        above = _mostly_above([options[id(caption)] for caption in of_kind], usual)
        for own in by_page.values():
            _choose([caption for caption in own if caption.kind == kind], options, above)


def _mostly_above(options: list[tuple[Region | None, Region | None]], usual: bool) -> bool:
    """The side on which a kind's regions stand, by those that have one side only."""
    votes = sum((above is not None) - (below is not None) for above, below in options if (above is None) != (below is None))
    return usual if votes == 0 else votes > 0


def _choose(captions: list[Caption], options: dict[int, tuple[Region | None, Region | None]], above: bool) -> None:
    """Give the captions of one kind and page their regions: those without a choice first, the preferred side next.

    A caption whose region is taken has none: a picture with another's caption is worse than no picture.
    """

    def preferred(caption: Caption) -> list[Region]:
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


def _candidates(caption: Caption, view: PageView) -> tuple[Region | None, Region | None]:
    """The regions above and below a caption that could be its own; one beside it stands for both."""
    column = column_of(caption, view)
    find = _table_region if caption.kind == "table" else _figure_region
    above, below = find(caption, view, column, True), find(caption, view, column, False)
    beside = region_beside(caption, view, column_of(caption, view, whole=True))
    if beside is None or any(_rivals(one, beside, caption) for one in (above, below)):
        return above, below
    return beside, None


def _rivals(one: Region | None, beside: Region, caption: Caption) -> bool:
    """Whether a region above or below a caption is another one than that beside it, and stands over or under the caption."""
    if one is None or one.weight < LEAST_WEIGHT or overlap(one.box, beside.box) > 0.3 * area(one.box):
        return False
    shared = min(one.box[2], caption.box[2]) - max(one.box[0], caption.box[0])
    return shared > 0.3 * (caption.box[2] - caption.box[0])


def _table_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """Rules and rows, or a table that is drawn as a picture."""
    region = table_region(caption, view, column, up)
    if region is not None:
        return region
    drawn = _figure_region(caption, view, column, up)
    return None if drawn is None else Region(drawn.box, 0.6 * drawn.weight, drawn.gap)


def _figure_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """What is drawn beside the caption with its labels; else a listing or a block of text that is no running text."""
    joined = False
    framed = _framed_region(caption, view, column, up)
    if framed is not None and framed.box[2] - framed.box[0] > 0.45 * (column[1] - column[0]):
        # The boxes of a diagram hold text, too: what is drawn beside them goes over the frames' sides then.
        middle = (view.boxes[:, 1] + view.boxes[:, 3]) / 2
        beside = view.boxes[(middle > framed.box[1]) & (middle < framed.box[3])]
        beside = beside[(beside[:, 2] > column[0]) & (beside[:, 0] < column[1])]
        # An arrow from another row of boxes.
        far = view.boxes[:, 1] < framed.box[1] - 12 if up else view.boxes[:, 3] > framed.box[3] + 12
        reaching = view.boxes[:, 3] > framed.box[1] - 1 if up else view.boxes[:, 1] < framed.box[3] + 1
        out = far & reaching & (view.boxes[:, 0] > framed.box[0]) & (view.boxes[:, 2] < framed.box[2])
        wide = len(beside) and (beside[:, 0].min() < framed.box[0] - 12 or beside[:, 2].max() > framed.box[2] + 12)
        joined = bool(out.any())
        if not wide and not joined:
            return framed
    band = band_of(caption, view, column, up, listings=not joined)
    boxes = view.boxes
    height = (boxes[:, 3] - boxes[:, 1]).clip(0.1)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    shared = boxes[:, 3].clip(None, band[3]) - boxes[:, 1].clip(band[1], None)
    drawn = boxes[(shared >= 0.6 * height - 0.1) & (middle >= band[0] - 2) & (middle <= band[2] + 2)]
    drawn = drawn[~crosses_gutter(drawn, column, view)]
    # The last rule of a frame around the text before the figure.
    for frame in view.frames:
        if not in_band(frame, band):
            drawn = drawn[~((drawn[:, :2] > np.array(frame[:2]) - 2) & (drawn[:, 2:] < np.array(frame[2:]) + 2)).all(axis=1)]
    solid = ((drawn[:, 3] - drawn[:, 1] > SOLID) & (drawn[:, 2] - drawn[:, 0] > SOLID)).any()
    # A lone rule is a separator, not a figure.
    if solid or len(drawn) >= 8:
        hull = _drawing(drawn, band, view)
        whole = to_caption(hull, band, view, up)
        box = off_caption(clip(whole, band), whole, caption, up)
        return Region(box, 1.0, gap_of(box, caption, up))
    return framed if framed is not None else _listing_region(caption, view, column, up)


def _drawing(drawn: Boxes, band: Box, view: PageView) -> Box:
    """The drawings of a figure with their labels. Rules far from what is solid are fraction bars or a table of the text."""
    kept = (drawn[:, 3] - drawn[:, 1] > SOLID) & (drawn[:, 2] - drawn[:, 0] > SOLID)
    # A plot whose axes are lines has nothing solid, but touching lines.
    for box in [] if kept.any() else view.clusters:
        if min(box[2] - box[0], box[3] - box[1]) > 3 * SOLID:
            kept |= ((drawn[:, :2] >= np.array(box[:2]) - 1) & (drawn[:, 2:] <= np.array(box[2:]) + 1)).all(axis=1)
    if not kept.any():
        kept = np.ones(len(drawn), bool)
    while True:
        low, high = drawn[kept, :2].min(axis=0).tolist(), drawn[kept, 2:].max(axis=0).tolist()
        hull = with_labels((low[0], low[1], high[0], high[1]), band, view)
        near = (drawn[:, 3] > hull[1] - NEAR_RULE) & (drawn[:, 1] < hull[3] + NEAR_RULE)
        if not (near & ~kept).any():
            return hull
        kept |= near


def _listing_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """Rules or nothing around lines that are set as a block next to the caption."""
    band = band_of(caption, view, column, up, listings=False)
    lines = [line for line in view.lines if in_band(line.box, band) and not line.turn]
    ruled = ruled_stretch(caption, view, band, up)
    # Text that is set between rules looks like running text, and has these instead of walls.
    if ruled is not None and any(line.mono and not inside(line.box, ruled, 4.0) for line in lines):
        # The rules of something else, beyond the listing.
        ruled = None if gap_of(ruled, caption, up) > 40 else ruled
    within = view.lines if ruled is not None and _is_free(ruled, caption, view, up) else lines
    if ruled is not None and any(inside(line.box, ruled, 4.0) for line in within):
        box = clip(ruled, (band[0], min(band[1], ruled[1] - MARGIN), band[2], max(band[3], ruled[3] + MARGIN)))
        return Region(box, 0.8, gap_of(box, caption, up))
    rows = rows_beside(caption, lines, up, 2.5 * view.style.body_size, FIRST_GAP * view.style.body_size)
    # Rows of something else beyond the listing, such as another table.
    if rows and rows[0].mono:
        rows = rows[: 1 + max(i for i, line in enumerate(rows) if line.mono)]
    mono = [line for line in rows if line.mono]
    if len(rows) < 2 or len(mono) * 2 < len(rows):
        return _text_region(caption, view, column, up)
    rules = [rule for rule in view.rules if in_band(rule, band)]
    hull = union([line.box for line in rows])
    hull = union([hull, *(rule for rule in rules if -8 < hull[1] - rule[3] < 8 or -8 < rule[1] - hull[3] < 8)])
    box = clip(hull, band)
    return Region(box, 0.5, gap_of(box, caption, up))


def _is_free(ruled: Box, caption: Caption, view: PageView, up: bool) -> bool:
    """Whether a stretch between rules is close to a caption and no table's."""
    return gap_of(ruled, caption, up) < 2.5 * view.style.body_size and not any(overlap(ruled, other) > 0 for other in view.taken)


def _framed_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """A frame with text in it right beside the caption, with what stands beside its lines, such as their numbers."""
    band = band_of(caption, view, column, up, listings=False)
    frames = [frame for frame in view.frames if overlap(frame, band) > 0.6 * area(frame)]
    near = [frame for frame in frames if gap_of(frame, caption, up) < 3 * view.style.body_size]
    if not near:
        return None
    # Shades are often drawn in pieces, one above the other.
    for _ in frames:
        others = [frame for frame in frames if frame not in near]
        more = [frame for frame in others if any(stacked(frame, one, 1.5 * view.style.body_size) for one in near)]
        if not more:
            break
        near += more
    frame = union(near)
    beside = [line.box for line in view.lines if frame[1] - 2 < line.middle < frame[3] + 2 and in_band(line.box, band)]
    box = clip(union([frame, *beside]), band)
    return Region(box, 0.8, gap_of(box, caption, up))


def _text_region(caption: Caption, view: PageView, column: tuple[float, float], up: bool) -> Region | None:
    """A formula, a diagram of letters or pseudocode: rows next to the caption that stand apart from the running text."""
    band = band_of(caption, view, column, up, listings=True)
    size = view.style.body_size
    rows = rows_beside(caption, [line for line in view.lines if in_band(line.box, band)], up, 2.5 * size, FIRST_GAP * size)
    if not rows:
        return None
    hull = union([line.box for line in rows])
    # A formula of the text stands as close to the text as to the caption.
    rest = hull[1] - band[1] if up else band[3] - hull[3]
    near = caption.box[1] - hull[3] if up else hull[1] - caption.box[3]
    if hull[3] - hull[1] < 2 * size or rest < near + 0.5 * size or 3 * sum(is_prose(line.text) for line in rows) > len(rows):
        return None
    box = clip(hull, band)
    return Region(box, 0.3, gap_of(box, caption, up))
