"""Which part of the page's width belongs to a caption and what stands above or below it."""

from moexpand.data.pdf_captions import Caption
from moexpand.data.pdf_text import Box, Line
from moexpand.data.pdf_view import PageView

LEAST_GUTTER = 4.0
"""Points of white between two floats that stand beside each other."""
NEAR_CAPTION = 5.0
"""Font sizes between a caption and the drawing that is its own, at most; axis labels stand between."""


def column_of(caption: Caption, view: PageView, whole: bool = False) -> tuple[float, float]:
    """Left and right end of the part of the page in which the caption's region stands.

    Args:
        caption: one of the page's.
        view: the page.
        whole: the gutter between columns of text is no limit, as for a caption beside a figure that crosses it.
    """
    page, split, box = view.page, None if whole else view.split, caption.box
    left, right = 0.0, page.width
    if split is not None and not (box[0] < split - 6 and box[2] > split + 6) and not _is_of_both_columns(caption, split, view):
        left, right = (0.0, split) if box[0] < split else (split, page.width)
    # Captions beside this one.
    for other in view.captions:
        if other is caption or min(other.box[3], box[3]) - max(other.box[1], box[1]) < 0.5 * caption.lines[0].size:
            continue
        if box[2] <= other.box[0] + 2 and other.box[0] < right:
            right = min(right, (box[2] + other.box[0]) / 2)
        if other.box[2] <= box[0] + 2 and other.box[2] > left:
            left = max(left, (other.box[2] + box[0]) / 2)
    left, right = _between_floats(caption, view, left, right)
    # Text that flows around the figure, or the text in whose margin the figure stands.
    flowing = [line for line in view.walls if not line.mono and left < (line.x0 + line.x1) / 2 < right]
    for line in _along([line for line in flowing if line.x1 <= box[0] + 2], caption):
        left = max(left, left if _is_spanned(line, caption, view) else (line.x1 + box[0]) / 2)
    for line in _along([line for line in flowing if line.x0 >= box[2] - 2], caption):
        right = min(right, right if _is_spanned(line, caption, view) else (line.x0 + box[2]) / 2)
    return _beside_texts(caption, view, left, right)


def _is_of_both_columns(caption: Caption, split: float, view: PageView) -> bool:
    """Whether a short caption on one side of the gutter belongs to a figure across both columns."""
    box, size = caption.box, view.style.body_size
    wide = [b for b in view.clusters if b[0] < split - 12 and b[2] > split + 12 and b[3] - b[1] > 36]
    if wide and abs((box[0] + box[2]) / 2 - view.page.width / 2) < 0.06 * view.page.width:
        return True
    # At the left end of the page's text, right next to what crosses the gutter, with nothing beside it.
    wide += [rule for rule in view.rules if rule[0] < split - 12 and rule[2] > split + 12]
    next_to = any(-2 < max(box[1] - b[3], b[1] - box[3]) < 4 * size and b[0] < box[2] and b[2] > box[0] for b in wide)
    other_side = [line for line in view.lines if (line.x0 > split - 3) != (box[0] > split - 3) and not line.turn]
    return next_to and box[0] < split and not any(_is_along(line, box) for line in other_side)


def _is_along(line: Line, box: Box) -> bool:
    """The line stands beside the box, left or right of it."""
    return min(line.y1, box[3]) - max(line.y0, box[1]) > 0.3 * (line.y1 - line.y0)


def _along(lines: list[Line], caption: Caption) -> list[Line]:
    """The lines of running text that stand beside a caption, if they do so over its whole height; else none."""
    found: list[Line] = []
    rows = 0
    for one in caption.lines:
        near = [line for line in lines if line.y0 - 4 < one.middle < line.y1 + 4]
        if not near and not found:
            return []
        found += near
        rows += bool(near)
    return found if rows >= 0.8 * len(caption.lines) else []


def _is_spanned(line: Line, caption: Caption, view: PageView) -> bool:
    """Whether something drawn next to a caption reaches over or under the text beside it: text and margin share that figure."""
    box = caption.box
    near = NEAR_CAPTION * view.style.body_size
    return any(
        max(box[1] - b[3], b[1] - box[3]) < near
        and b[0] < min(line.x1, box[2]) - 12
        and b[2] > max(line.x0, box[0]) + 12
        and (b[3] < line.middle or b[1] > line.middle)
        for b in view.clusters
    )


def _between_floats(caption: Caption, view: PageView, left: float, right: float) -> tuple[float, float]:
    """Narrowed by the white between this caption's float and others beside it, at whatever heights their captions stand."""
    box = caption.box
    for other in view.captions:
        strip = (box[2], other.box[0]) if other.box[0] > box[2] else (other.box[2], box[0])
        if other is caption or strip[1] - strip[0] < LEAST_GUTTER or not (left < strip[1] and strip[0] < right):
            continue
        top, bottom = min(box[1], other.box[1]), max(box[3], other.box[3])
        walls = [wall for wall in view.walls if wall.x1 > min(box[0], other.box[0]) and wall.x0 < max(box[2], other.box[2])]
        if any(top < wall.middle < bottom for wall in walls):
            continue
        # All that lies between the text above and below both.
        top = max((wall.y1 for wall in walls if wall.middle <= top), default=0.0)
        bottom = min((wall.y0 for wall in walls if wall.middle >= bottom), default=view.page.height)
        things = [*view.clusters, *view.rules, *(line.box for line in view.lines)]
        free = _free(strip, [(thing[0], thing[2]) for thing in things if thing[1] > top - 2 and thing[3] < bottom + 2])
        if free is None:
            continue
        left, right = (left, min(right, free)) if other.box[0] > box[2] else (max(left, free), right)
    return left, right


def _free(strip: tuple[float, float], spans: list[tuple[float, float]]) -> float | None:
    """The middle of the widest part of a strip that no span covers."""
    best, where = LEAST_GUTTER, None
    edge = strip[0]
    for start, end in [*sorted(spans), (strip[1], strip[1])]:
        if end < strip[0] or start > strip[1]:
            continue
        if start - edge > best:
            best, where = start - edge, (start + edge) / 2
        edge = max(edge, end)
    return where


def _beside_texts(caption: Caption, view: PageView, left: float, right: float) -> tuple[float, float]:
    """Narrowed by paragraphs that stand beside the drawing next to a caption."""
    box = caption.box
    near = NEAR_CAPTION * view.style.body_size
    drawn = [b for b in view.clusters if min(b[2] - b[0], b[3] - b[1]) > 24 and b[2] > box[0] and b[0] < box[2]]
    drawn = [b for b in drawn if max(box[1] - b[3], b[1] - box[3]) < near]
    for text in view.texts:
        beside = [b for b in drawn if min(b[3], text[3]) - max(b[1], text[1]) > 0.3 * (text[3] - text[1])]
        if text[2] < box[0] and any(text[2] < b[0] for b in beside):
            left = max(left, (text[2] + min([box[0], *(b[0] for b in beside if text[2] < b[0])])) / 2)
        if text[0] > box[2] and any(text[0] > b[2] for b in beside):
            right = min(right, (text[0] + max([box[2], *(b[2] for b in beside if text[0] > b[2])])) / 2)
    return left, right
