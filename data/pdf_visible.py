"""Which characters of a page can be seen in its rendering. Text that nobody sees could instruct a captioner.

Most text needs no rendering: dark, filled, upright under its clip, nothing painted over it. For the rest the page is rendered
twice, with and without the text objects in question; a character that changes no pixel is not visible, whatever hides it: paint
of the background's colour, a cover, a clip, a layer that is switched off. White text that crosses a line changes some pixels of
the line, so an object must change a part of its area, too.
"""

import numpy as np
import pypdfium2 as pdfium
from numpy.typing import NDArray

from moexpand.data import pdf_native as native
from moexpand.data.pdf_objects import Floats, PageObjects

MIN_CHANGE = 12
"""Levels of 255 by which a visible character changes some pixel at least."""
MIN_SHARE = 0.05
"""Pixels that an object changes at least, of those in its characters' boxes; letters change a fifth to a third of theirs."""
MAX_CHECK_PIXELS = 4_000_000
MIN_SIZE = 1.0
"""Points; smaller text is not read by anybody."""
_BLOCK = 4_000_000
"""Pairs of text object and cover that are compared at a time."""


def visible_characters(
    page: pdfium.PdfPage, handles: list[int], owner: NDArray[np.int64], boxes: Floats, sizes: Floats, objects: PageObjects
) -> NDArray[np.bool_]:
    """Whether each of a page's characters can be seen.

    Args:
        page: open page.
        handles: text objects that own characters, [O].
        owner: number of the object of each character, [N].
        boxes: of the characters, [N, 4], points from the top left.
        sizes: font size of each object in points, [O].
        objects: all objects of the page.
    """
    place = {handle: i for i, handle in enumerate(objects.handles)}
    known = np.array([place.get(handle, -1) for handle in handles], np.int64)
    found = known >= 0
    hidden = sizes < MIN_SIZE
    odd = ~found
    clip = np.broadcast_to(np.array([-1e9, -1e9, 1e9, 1e9]), (len(handles), 4)).copy()
    order = np.full(len(handles), -1, np.int64)
    if found.any():
        chosen = known[found]
        hidden[found] |= objects.text_hidden[chosen]
        odd[found] = objects.text_odd[chosen]
        clip[found] = objects.text_clip[chosen]
        order[found] = objects.text_order[chosen]
    odd |= _covered(_hulls(boxes, owner, len(handles)), order, objects)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    limits = clip[owner]
    visible = ~hidden[owner] & (middle >= limits[:, :2] - 0.5).all(axis=1) & (middle <= limits[:, 2:] + 0.5).all(axis=1)
    doubtful = visible & odd[owner]
    if doubtful.any():
        suspects = [handles[i] for i in np.unique(owner[doubtful])]
        changed, area = _changed_pixels(page, suspects, boxes[doubtful])
        by_object = np.bincount(owner[doubtful], changed, len(handles)) / np.bincount(owner[doubtful], area, len(handles)).clip(1)
        visible[doubtful] = (changed > 0) & (by_object >= MIN_SHARE)[owner[doubtful]]
    return visible


def _hulls(boxes: Floats, owner: NDArray[np.int64], count: int) -> Floats:
    """Box around the characters of each object, [O, 4]."""
    hulls = np.full((count, 4), 1e9)
    hulls[:, 2:] = -1e9
    np.minimum.at(hulls[:, :2], owner, boxes[:, :2])
    np.maximum.at(hulls[:, 2:], owner, boxes[:, 2:])
    return hulls


def _covered(hulls: Floats, order: NDArray[np.int64], objects: PageObjects) -> NDArray[np.bool_]:
    """Objects that something opaque may have been painted over, or that stand on something dark."""
    covered = np.zeros(len(hulls), bool)
    step = max(_BLOCK // max(len(hulls), 1), 1)
    for start in range(0, len(objects.covers), step):
        covers, later = objects.covers[start : start + step], objects.cover_order[start : start + step]
        meets = (later[None, :] > order[:, None]) | objects.cover_dark[None, start : start + step]
        for axis in (0, 1):
            meets &= hulls[:, None, axis] < covers[None, :, axis + 2]
            meets &= hulls[:, None, axis + 2] > covers[None, :, axis]
        covered |= meets.any(axis=1)
    return covered


def _changed_pixels(page: pdfium.PdfPage, suspects: list[int], boxes: Floats) -> tuple[Floats, Floats]:
    """Of each box [N, 4]: how many pixels change when the text objects are taken away, and how many it has."""
    width, height = page.get_size()
    scale = min(1.0, (MAX_CHECK_PIXELS / (width * height)) ** 0.5)
    rows, columns = int(np.ceil(height * scale)), int(np.ceil(width * scale))
    x0 = np.clip(np.floor(boxes[:, 0] * scale), 0, columns).astype(int)
    y0 = np.clip(np.floor(boxes[:, 1] * scale), 0, rows).astype(int)
    x1 = np.clip(np.ceil(boxes[:, 2] * scale), 0, columns).astype(int)
    y1 = np.clip(np.ceil(boxes[:, 3] * scale), 0, rows).astype(int)
    left, top, right, bottom = int(x0.min()), int(y0.min()), int(x1.max()), int(y1.max())
    part = (slice(top, bottom), slice(left, right))
    with_text = _render(page, scale)[part].copy()
    try:
        for handle in suspects:
            native.object_set_active(handle, 0)
        without = _render(page, scale)[part]
    finally:
        for handle in suspects:
            native.object_set_active(handle, 1)
    # Of two unsigned values, the larger less the smaller.
    different = np.maximum(with_text, without) - np.minimum(with_text, without) >= MIN_CHANGE
    changed = different[..., 0] | different[..., 1] | different[..., 2]
    total = np.zeros((bottom - top + 1, right - left + 1), np.int32)
    np.cumsum(np.cumsum(changed, axis=1, dtype=np.int32), axis=0, out=total[1:, 1:])
    x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return inside.astype(np.float64), ((x1 - x0) * (y1 - y0)).astype(np.float64)


def _render(page: pdfium.PdfPage, scale: float) -> NDArray[np.uint8]:
    bitmap = page.render(scale=scale, may_draw_forms=False, draw_annots=False)
    pixels: NDArray[np.uint8] = bitmap.to_numpy()
    return pixels
