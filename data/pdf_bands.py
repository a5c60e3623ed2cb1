"""Where a caption's region may lie: the part of the page's width that is the caption's own, and the strip up to the next wall."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moexpand.data.pdf_captions import Caption, union
from moexpand.data.pdf_shapes import Boxes, inside
from moexpand.data.pdf_text import Box, Line
from moexpand.data.pdf_view import PageView

MARGIN = 3.0
"""Points of white kept around a region."""
MARGIN_LABEL = 20.0
"""Points from the text's left margin within which a drawing begins that may have a title at the margin."""
FIRST_GAP = 4.0
"""Font sizes between a caption and the rows that belong to it, at most."""

TITLE = 48.0
"""Points of white between a plot and its title, at most."""


@dataclass(frozen=True)
class Region:
    """A region that a caption could have."""

    box: Box
    weight: float
    """How sure it is that this is a figure or table: drawings 1, listings and rows less."""
    gap: float
    """Points between caption and region."""


def crosses_gutter(boxes: Boxes, column: tuple[float, float], view: PageView) -> NDArray[np.bool_]:
    """Which of the boxes [N, 4] stand in both columns while the caption has one: they are another figure's or table's."""
    if view.split is None or view.split not in column:
        return np.zeros(len(boxes), bool)
    found: NDArray[np.bool_] = (boxes[:, 0] < view.split - 12) & (boxes[:, 2] > view.split + 12)
    return found


def band_of(caption: Caption, view: PageView, column: tuple[float, float], up: bool, listings: bool) -> Box:
    """The strip between the caption and the nearest wall or page edge; `listings`: monospaced lines are walls, too."""
    x0, x1 = column
    walls = [other.box for other in view.captions if other is not caption]
    walls += [line.box for line in view.walls if listings or not (line.mono or framed(line, view))]
    walls = [box for box in walls if box[2] > x0 + 2 and box[0] < x1 - 2]
    rules = np.array(view.rules + view.clusters).reshape(-1, 4)
    # A table or a figure across both columns.
    walls += [(b[0], b[1], b[2], b[3]) for b in rules[crosses_gutter(rules, column, view)].tolist()]
    walls += [box for box in view.taken if box[2] > x0 + 2 and box[0] < x1 - 2]
    # Text beside a caption that stands in the margin, below a figure across text and margin.
    walls = [box for box in walls if not _is_beside(box, caption.box)]
    middle = (caption.box[1] + caption.box[3]) / 2
    if up:
        edge = max((box[3] for box in walls if (box[1] + box[3]) / 2 < middle), default=0.0)
        return (x0, min(edge, caption.box[1]), x1, caption.box[1])
    edge = min((box[1] for box in walls if (box[1] + box[3]) / 2 > middle), default=view.page.height)
    return (x0, caption.box[3], x1, max(edge, caption.box[3]))


def _is_beside(box: Box, caption: Box) -> bool:
    """Left or right of the caption, at its height."""
    apart = box[2] <= caption[0] + 2 or box[0] >= caption[2] - 2
    return apart and min(box[3], caption[3]) - max(box[1], caption[1]) > 0.3 * (box[3] - box[1])


def framed(line: Line, view: PageView) -> bool:
    return any(inside(line.box, frame, 2.0) for frame in view.frames)


def in_band(box: Box, band: Box, part: float = 0.6) -> bool:
    """At least `part` of the box's height lies in the band, and its middle between the band's sides."""
    height = max(box[3] - box[1], 0.1)
    shared = min(box[3], band[3]) - max(box[1], band[1])
    return shared >= part * height - 0.1 and band[0] - 2 <= (box[0] + box[2]) / 2 <= band[2] + 2


def gap_of(box: Box, caption: Caption, up: bool) -> float:
    return caption.box[1] - box[3] if up else box[1] - caption.box[3]


def with_labels(hull: Box, band: Box, view: PageView) -> Box:
    """The drawing and the text in it and close to it: how close depends on whether it is set like labels inside the drawing."""
    labels = [line for line in view.lines if in_band(line.box, band)]
    for _ in range(4):
        families = {_family(line.font) for line in labels if inside(line.box, hull, 2.0)}
        near = [line.box for line in labels if _is_near(line, hull, families, view)]
        grown = union([hull, *near])
        if grown == hull:
            break
        hull = grown
    return hull


def _reach(line: Line, families: set[str], view: PageView) -> float:
    """Points of white that may part a label from its drawing."""
    if line.font in view.style.body_fonts and line.size >= view.style.body_size - 0.6:
        return 12.0
    if _family(line.font) in families:
        return 30.0
    return 12.0 if families else 20.0


def _is_title(line: Line, hull: Box, families: set[str], view: PageView) -> bool:
    """In the font of the drawing's labels, no font of the text, centred above it: plots have their titles in wide margins."""
    texts = {_family(font) for font in view.style.body_fonts}
    if _family(line.font) not in families - texts or not 0 < hull[1] - line.y1 < TITLE:
        return False
    return abs((line.x0 + line.x1) - (hull[0] + hull[2])) < 0.1 * (hull[2] - hull[0]) and line.width < hull[2] - hull[0]


def _family(font: str) -> str:
    """Name of a font without its weight and slant."""
    return font.split("-")[0].split(",")[0]


def _is_near(line: Line, hull: Box, families: set[str], view: PageView) -> bool:
    """In or close to a drawing. Above or below it, a line from the text's margin on is no label of a narrower drawing."""
    reach = _reach(line, families, view)
    if _is_title(line, hull, families, view):
        return True
    if line.y1 <= hull[1] - reach or line.y0 >= hull[3] + reach:
        return False
    if hull[1] < line.middle < hull[3] or _family(line.font) in families:
        return True
    left, _ = view.margins(view.column(line))
    return abs(line.x0 - left) > 2.0 or hull[0] < left + MARGIN_LABEL


def to_caption(hull: Box, band: Box, view: PageView, up: bool) -> Box:
    """With all that stands between a drawing and its caption: labels of panels, notes."""
    labels = [line.box for line in view.lines if in_band(line.box, band)]
    between = [box for box in labels if (box[3] > hull[3] if up else box[1] < hull[1])]
    return union([hull, *between])


def rows_beside(caption: Caption, lines: list[Line], up: bool, reach: float, first: float | None = None) -> list[Line]:
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


def clip(box: Box, band: Box) -> Box:
    """The box with its margin, within the band; what reaches over the band's sides stays whole."""
    return (
        min(box[0], max(box[0] - MARGIN, band[0])),
        max(box[1] - MARGIN, band[1]),
        max(box[2], min(box[2] + MARGIN, band[2])),
        min(box[3] + MARGIN, band[3]),
    )


def between(box: Box, region: Box) -> bool:
    """Between the left and the right end of the region."""
    return box[0] > region[0] - 4 and box[2] < region[2] + 4


def off_caption(box: Box, inner: Box, caption: Caption, up: bool) -> Box:
    """The region without the strip next to its caption into which letters may reach down or up.

    Args:
        box: the region with its margin.
        inner: without it.
        caption: the region's.
        up: the region is above its caption.
    """
    reach = 0.2 * caption.lines[0].size
    if up:
        return (box[0], box[1], box[2], min(box[3], max(inner[3], caption.box[1] - reach)))
    return (box[0], max(box[1], min(inner[1], caption.box[3] + reach)), box[2], box[3])
