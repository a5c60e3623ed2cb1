"""Boxes of drawings: rules from their pieces, frames from their sides, drawings that touch."""

import numpy as np
from numpy.typing import NDArray

from moexpand.data.pdf_captions import union
from moexpand.data.pdf_text import Box, Line

Boxes = NDArray[np.float64]

CELL = 6.0
"""Points of the grid in which drawings that touch are joined."""
NEAR = 4.0
"""Points between drawings that still belong together."""
RULE = 2.5
"""Height in points up to which a drawing is a horizontal rule."""


def inside(box: Box, frame: Box, slack: float) -> bool:
    """The box lies in the frame."""
    return box[0] > frame[0] - slack and box[1] > frame[1] - slack and box[2] < frame[2] + slack and box[3] < frame[3] + slack


def area(box: Box) -> float:
    """Square points."""
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def overlap(one: Box, other: Box) -> float:
    """Square points that two boxes share."""
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def stacked(one: Box, other: Box, near: float) -> bool:
    """Two frames touch, or are near with the same width: the listings of one figure, each with a frame of its own."""
    gap = max(one[1] - other[3], other[1] - one[3])
    same = abs(one[0] - other[0]) < 3 and abs(one[2] - other[2]) < 3
    same = same or abs((one[2] - one[0]) - (other[2] - other[0])) < 1
    return gap < (near if same else 3)


def join_rules(boxes: Boxes) -> list[Box]:
    """Horizontal rules at least 40 points long, from pieces on one height that touch or nearly do."""
    thin = boxes[(boxes[:, 3] - boxes[:, 1] < RULE) & (boxes[:, 2] - boxes[:, 0] > 4)]
    rules: list[list[float]] = []
    for x0, y0, x1, y1 in sorted(thin.tolist(), key=lambda b: (round((b[1] + b[3]) / 2), b[0])):
        last = rules[-1] if rules else None
        if last is not None and abs((last[1] + last[3]) - (y0 + y1)) < 2.0 and x0 - last[2] < 8:
            last[1], last[2], last[3] = min(last[1], y0), max(last[2], x1), max(last[3], y1)
        else:
            rules.append([x0, y0, x1, y1])
    found = [(r[0], r[1], r[2], r[3]) for r in rules if r[2] - r[0] > 40]
    return sorted(found, key=lambda r: (r[1], r[0]))


def bridge_titles(rules: list[Box], lines: list[Line]) -> list[Box]:
    """Rules that a title is set into, as whole ones: two pieces on one height with nothing but a line of text between them."""
    found: list[Box] = []
    for rule in rules:
        for i, left in enumerate(found):
            gap = rule[0] - left[2]
            if abs(left[1] - rule[1]) > 2 or gap <= 0:
                continue
            y = (rule[1] + rule[3]) / 2
            titles = [line for line in lines if line.y0 < y < line.y1 and line.x0 > left[2] - 2 and line.x1 < rule[0] + 2]
            if sum(line.width for line in titles) > 0.5 * gap:
                found[i] = union([left, rule])
                break
        else:
            found.append(rule)
    return found


def framed_by_lines(boxes: Boxes, rules: list[Box]) -> list[Box]:
    """Frames drawn piece by piece: two rules of one width with lines between their ends."""
    upright = boxes[(boxes[:, 2] - boxes[:, 0] < RULE) & (boxes[:, 3] - boxes[:, 1] > 4)]
    if not len(upright) or len(rules) < 2:
        return []
    # With the axes swapped, vertical lines are rules.
    lines = [(y0, x0, y1, x1) for x0, y0, x1, y1 in join_rules(upright[:, [1, 0, 3, 2]])]
    frames = []
    for i, top in enumerate(rules):
        for bottom in rules[i + 1 : i + 40]:
            if abs(top[0] - bottom[0]) > 3 or abs(top[2] - bottom[2]) > 3:
                continue
            sides = [
                any(abs((line[0] + line[2]) / 2 - x) < 3 and line[1] < top[3] + 6 and line[3] > bottom[1] - 6 for line in lines)
                for x in (top[0], top[2])
            ]
            if all(sides):
                frames.append((top[0], top[1], top[2], bottom[3]))
    return frames


def cluster(boxes: Boxes) -> list[Box]:
    """Boxes around drawings that touch or nearly do; long rules alone make none."""
    drawn = boxes[(boxes[:, 3] - boxes[:, 1] > RULE) | (boxes[:, 2] - boxes[:, 0] < 60)]
    cells = np.concatenate([np.floor((drawn[:, :2] - NEAR / 2) / CELL), np.ceil((drawn[:, 2:] + NEAR / 2) / CELL)], axis=1)
    # Many small marks fall on few cells; large boxes first, so that they swallow the small ones.
    cells = np.unique(cells, axis=0)
    cells = cells[np.argsort(-(cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1]), kind="stable")]
    hulls = [tuple(cell) for cell in cells.tolist()]
    while True:
        merged: list[Box] = []
        for x0, y0, x1, y1 in hulls:
            apart = []
            for hull in merged:
                if hull[0] < x1 and x0 < hull[2] and hull[1] < y1 and y0 < hull[3]:
                    x0, y0, x1, y1 = min(x0, hull[0]), min(y0, hull[1]), max(x1, hull[2]), max(y1, hull[3])
                else:
                    apart.append(hull)
            merged = [*apart, (x0, y0, x1, y1)]
        if len(merged) == len(hulls):
            half = NEAR / 2
            return [(x0 * CELL + half, y0 * CELL + half, x1 * CELL - half, y1 * CELL - half) for x0, y0, x1, y1 in merged]
        hulls = merged
