"""Figures and tables whose caption stands beside them: in a margin, or left or right of what is narrower than the text."""

import numpy as np

from moexpand.data.pdf_bands import Region, clip, with_labels
from moexpand.data.pdf_captions import Caption, union
from moexpand.data.pdf_shapes import area, inside
from moexpand.data.pdf_text import Box
from moexpand.data.pdf_view import PageView

LEAST_SIDE = 36.0
"""Points that a drawing beside a caption is wide and high at least."""
FARTHEST = 0.25
"""Of the page's width: white between a caption and what it stands beside."""
JOINED = 14.0
"""Points of white that part two drawings of one figure, one above the other."""


def region_beside(caption: Caption, view: PageView, column: tuple[float, float]) -> Region | None:
    """What is drawn left or right of a caption, at its height.

    Args:
        caption: any caption of the page.
        view: the page.
        column: left and right end of the part of the page that is the caption's.
    """
    x0, _, x1, _ = caption.box
    found = []
    for strip in ((column[0], x0), (x1, column[1])):
        pieces = [box for box in [*view.clusters, *view.rules] if strip[0] - 2 < box[0] and box[2] < strip[1] + 2]
        # Clusters leave long rules out.
        tables = _ruled_stretches(view, strip) if caption.kind == "table" else []
        pieces += tables
        for top, bottom in _free_stretches(caption, view, strip, tables) if pieces else []:
            region = _drawn_in(caption, view, pieces, (strip[0], top, strip[1], bottom))
            if region is not None:
                found.append(region)
    return max(found, key=lambda region: area(region.box), default=None)


def _free_stretches(caption: Caption, view: PageView, strip: tuple[float, float], tables: list[Box]) -> list[tuple[float, float]]:
    """The heights between which no text runs through a strip, as far as they reach the caption's height."""
    walls = [other.box for other in view.captions if other is not caption]
    # The cells of a table may look like text.
    walls += [line.box for line in view.walls if not any(inside(line.box, table, 4.0) for table in tables)]
    walls = sorted((box for box in walls if box[2] > strip[0] + 2 and box[0] < strip[1] - 2), key=lambda box: box[1])
    stretches = []
    top = 0.0
    for box in [*walls, (0.0, view.page.height, 0.0, view.page.height)]:
        if box[1] > top and box[1] > caption.box[1] and top < caption.box[3]:
            stretches.append((top, box[1]))
        top = max(top, box[3])
    return stretches


def _drawn_in(caption: Caption, view: PageView, pieces: list[Box], band: Box) -> Region | None:
    """The drawings in a band beside a caption that are at its height, with their labels."""
    _, top, _, bottom = caption.box
    held = [box for box in pieces if box[1] > band[1] - 4 and box[3] < band[3] + 4]
    seeds = [box for box in held if box[3] > top - 2 * JOINED and box[1] < bottom + 2 * JOINED]
    if not seeds:
        return None
    hull = union(seeds)
    # Shades of every other row are as far from each other as a row is high.
    joined = JOINED if caption.kind == "figure" else 2.5 * view.style.body_size
    for _ in held:
        grown = union([hull, *(box for box in held if max(box[1] - hull[3], hull[1] - box[3]) < joined)])
        if grown == hull:
            break
        hull = grown
    # Clusters are known to a few points; their drawings exactly.
    boxes = view.boxes
    own = boxes[(boxes[:, :2] >= np.array(hull[:2]) - 1).all(axis=1) & (boxes[:, 2:] <= np.array(hull[2:]) + 1).all(axis=1)]
    if not len(own):
        return None
    (x0, y0), (x1, y1) = own[:, :2].min(axis=0).tolist(), own[:, 2:].max(axis=0).tolist()
    box = with_labels((x0, y0, x1, y1), band, view)
    shared = min(box[3], bottom) - max(box[1], top)
    apart = max(caption.box[0] - box[2], box[0] - caption.box[2])
    if min(x1 - x0, y1 - y0) < LEAST_SIDE or shared < 0.5 * min(box[3] - box[1], bottom - top):
        return None
    return Region(clip(box, band), 1.0, 0.0) if apart < FARTHEST * view.page.width else None


def _ruled_stretches(view: PageView, strip: tuple[float, float]) -> list[Box]:
    """Stretches between rules of one width in a strip."""
    rules = [rule for rule in view.rules if strip[0] - 2 < rule[0] and rule[2] < strip[1] + 2]
    found = []
    for i, top in enumerate(rules):
        same = [rule for rule in rules[i + 1 :] if abs(rule[0] - top[0]) < 4 and abs(rule[2] - top[2]) < 4]
        walls = [line.y0 for line in view.walls if line.x0 < top[0] - 4 or line.x1 > top[2] + 4]
        # The next table is parted from this one by text.
        reached = [rule for rule in same if not any(top[1] < y < rule[1] for y in walls)]
        if reached:
            found.append(union([top, reached[-1]]))
    return found
