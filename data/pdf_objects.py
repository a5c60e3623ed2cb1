"""What lies on a page of a PDF: drawings with their boxes, and what could keep each text object from being seen.

Objects inside Form XObjects are taken one by one, cut to the clip paths of the object and of all forms around it; PDFium itself
returns the text of a form whatever its clip hides.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as raw
from numpy.typing import NDArray

from moexpand.data import pdf_native as native

Floats = NDArray[np.float64]
Matrix = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): x' = a x + c y + e, y' = b x + d y + f, as in PDF."""

MAX_OBJECTS = 200_000
"""Objects of a page, those in forms included."""
MAX_DEPTH = 12
"""Forms within forms."""
MAX_CLIPPED = 3000
"""Drawings of one form or page whose clip paths are read; those of text are always read."""
MAX_CLIP_SEGMENTS = 64
PALE = 250
"""A drawing whose every channel is above this is taken for white."""
LIGHT = 190.0
"""Text of a higher luma may be too light to be seen on white."""
TINT = 210.0
"""Dark text shows on ground of a higher luma."""
LUMA = np.array([0.299, 0.587, 0.114])
NEVER_PAINTED = (raw.FPDF_TEXTRENDERMODE_INVISIBLE, raw.FPDF_TEXTRENDERMODE_CLIP)
PLAIN = (raw.FPDF_TEXTRENDERMODE_FILL, raw.FPDF_TEXTRENDERMODE_FILL_STROKE)
EVERYWHERE = (-1e9, -1e9, 1e9, 1e9)


class TooManyObjects(Exception):
    """The page is a bomb, or a drawing of a size that nobody prints."""


@dataclass
class PageObjects:
    """Drawings [G] and text objects [T] of a page. Boxes are points from the top left of the page, (x0, y0, x1, y1)."""

    boxes: Floats
    """[G, 4]: drawings with some visible paint, cut to their clip and to the page."""
    covers: Floats
    """[C, 4]: opaque drawings, white ones included, that hide what was drawn before them."""
    cover_order: NDArray[np.int64]
    """[C]: place in the order of painting."""
    cover_dark: NDArray[np.bool_]
    """[C]: so dark, or of unknown colour, that dark text on it may not be seen."""
    handles: list[int]
    """[T]: of text objects."""
    text_order: NDArray[np.int64]
    """[T]: place in the order of painting."""
    text_clip: Floats
    """[T, 4]: box around what their clip paths leave."""
    text_hidden: NDArray[np.bool_]
    """[T]: never painted."""
    text_odd: NDArray[np.bool_]
    """[T]: light, stroked, inside a form, under an irregular clip or in a layer: only a rendering tells whether it shows."""


def page_matrix(page: pdfium.PdfPage) -> tuple[Matrix, float, float]:
    """From PDF space to points from the top left of the page as it is shown, and the page's width and height."""
    # PDFium's own box: those that a page inherits from the tree of pages are not given as its media and crop box.
    left, bottom, right, top = page.get_bbox()
    width, height = page.get_size()
    rotation = page.get_rotation()
    if rotation == 90:
        return (0.0, 1.0, 1.0, 0.0, -bottom, -left), width, height
    if rotation == 180:
        return (-1.0, 0.0, 0.0, 1.0, right, -bottom), width, height
    if rotation == 270:
        return (0.0, -1.0, -1.0, 0.0, top, right), width, height
    return (1.0, 0.0, 0.0, -1.0, -left, top), width, height


def combine(inner: Matrix, outer: Matrix) -> Matrix:
    """The matrix that applies `inner` first."""
    a, b, c, d, e, f = inner
    p, q, r, s, t, u = outer
    return (a * p + b * r, a * q + b * s, c * p + d * r, c * q + d * s, e * p + f * r + t, e * q + f * s + u)


def transform_boxes(boxes: NDArray[Any], matrix: Matrix) -> Floats:
    """Boxes [N, 4] around the images of boxes [N, 4] given as two opposite corners."""
    a, b, c, d, e, f = matrix
    x0, y0, x1, y1 = boxes.astype(np.float64).T
    ax0, ax1, cy0, cy1 = a * x0, a * x1, c * y0, c * y1
    bx0, bx1, dy0, dy1 = b * x0, b * x1, d * y0, d * y1
    return np.stack(
        [
            np.minimum(ax0, ax1) + np.minimum(cy0, cy1) + e,
            np.minimum(bx0, bx1) + np.minimum(dy0, dy1) + f,
            np.maximum(ax0, ax1) + np.maximum(cy0, cy1) + e,
            np.maximum(bx0, bx1) + np.maximum(dy0, dy1) + f,
        ],
        axis=1,
    )


def read_objects(page: pdfium.PdfPage) -> PageObjects:
    """All objects of an open page.

    Raises:
        TooManyObjects: the page has more than MAX_OBJECTS.
    """
    matrix, width, height = page_matrix(page)
    walk = _Walk((0.0, 0.0, width, height))
    handle = native.address(page.raw)
    walk.container(native.page_object, handle, raw.FPDFPage_CountObjects(page.raw), matrix, EVERYWHERE, False, 0)
    return walk.result()


class _Walk:
    """Collects objects depth first, in the order of painting."""

    def __init__(self, page: tuple[float, float, float, float]) -> None:
        self.page = page
        self.order = 0
        self.boxes: list[Floats] = [np.empty((0, 4))]
        self.covers: list[Floats] = [np.empty((0, 4))]
        self.cover_order: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.cover_dark: list[NDArray[np.bool_]] = [np.empty(0, bool)]
        self.handles: list[int] = []
        self.text_order: list[int] = []
        self.text_clip: list[tuple[float, ...]] = []
        self.text_hidden: list[bool] = []
        self.text_odd: list[bool] = []

    def result(self) -> PageObjects:
        return PageObjects(
            boxes=np.concatenate(self.boxes),
            covers=np.concatenate(self.covers),
            cover_order=np.concatenate(self.cover_order),
            cover_dark=np.concatenate(self.cover_dark),
            handles=self.handles,
            text_order=np.array(self.text_order, np.int64),
            text_clip=np.array(self.text_clip, np.float64).reshape(-1, 4),
            text_hidden=np.array(self.text_hidden, bool),
            text_odd=np.array(self.text_odd, bool),
        )

    def container(
        self,
        get: Callable[[int, int], int],
        owner: int,
        count: int,
        matrix: Matrix,
        clip: tuple[float, ...],
        odd: bool,
        depth: int,
    ) -> None:
        """Objects of a page or a form. `clip` is a box in page points; `odd`: their text may be hidden by what is around them."""
        if self.order + count > MAX_OBJECTS:
            raise TooManyObjects
        handles = [handle for handle in map(get, repeat(owner), range(count)) if handle]
        kinds = np.fromiter(map(native.object_type, handles), np.int64, len(handles))
        orders = np.arange(self.order, self.order + len(handles))
        self.order += len(handles)
        drawn = np.flatnonzero((kinds != raw.FPDF_PAGEOBJ_TEXT) & (kinds != raw.FPDF_PAGEOBJ_FORM))
        if len(drawn):
            self._drawings([handles[i] for i in drawn], kinds[drawn], orders[drawn], matrix, clip)
        texts = np.flatnonzero(kinds == raw.FPDF_PAGEOBJ_TEXT)
        if len(texts):
            self._texts([handles[i] for i in texts], orders[texts], matrix, clip, odd)
        for i in np.flatnonzero(kinds == raw.FPDF_PAGEOBJ_FORM):
            if depth >= MAX_DEPTH:
                continue
            form = handles[i]
            own, _ = _clip_of(form, matrix)
            place = (ctypes.c_float * 6)()
            native.object_matrix(form, ctypes.addressof(place))
            inner = combine((place[0], place[1], place[2], place[3], place[4], place[5]), matrix)
            # Text in forms is always checked: a form can lie in a layer that is switched off, which PDFium does not tell.
            self.container(native.form_object, form, max(native.form_count(form), 0), inner, _meet(clip, own), True, depth + 1)

    def _drawings(
        self, handles: list[int], kinds: NDArray[np.int64], orders: NDArray[np.int64], matrix: Matrix, clip: tuple[float, ...]
    ) -> None:
        count = len(handles)
        bounds = np.zeros((count, 4), np.float32)
        start = bounds.ctypes.data
        places = [range(start + 4 * i, start + 4 * i + 16 * count, 16) for i in range(4)]
        known = np.fromiter(map(native.object_bounds, handles, *places), bool, count)
        boxes = transform_boxes(bounds, matrix)
        clips = [_clip_of(handle, matrix)[0] for handle in handles[:MAX_CLIPPED]]
        boxes = _cut(boxes, np.array(_meet(clip, self.page)))
        boxes[: len(clips)] = _cut(boxes[: len(clips)], np.array(clips).reshape(-1, 4))
        known &= (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])
        visible, opaque, dark = _paint(handles, kinds)
        self.boxes.append(boxes[known & visible])
        self.covers.append(boxes[known & opaque])
        self.cover_order.append(orders[known & opaque])
        self.cover_dark.append(dark[known & opaque])

    def _texts(self, handles: list[int], orders: NDArray[np.int64], matrix: Matrix, clip: tuple[float, ...], odd: bool) -> None:
        modes = list(map(native.text_mode, handles))
        fills, known = _colours(native.object_fill, handles)
        plain = known & (fills[:, :3] @ LUMA <= LIGHT) & (fills[:, 3] > 128)
        for i, handle in enumerate(handles):
            own, irregular = _clip_of(handle, matrix)
            self.handles.append(handle)
            self.text_order.append(int(orders[i]))
            self.text_clip.append(_meet(clip, own))
            self.text_hidden.append(modes[i] in NEVER_PAINTED)
            # Marked content may belong to a layer; plain tags of structure are checked with it.
            layered = native.object_marks(handle) > 0 and _in_layer(handle)
            self.text_odd.append(odd or irregular or layered or modes[i] not in PLAIN or not plain[i])


def _paint(handles: list[int], kinds: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each drawing: whether it has paint other than white, hides what lies under its box, may hide dark text on it."""
    count = len(handles)
    modes = np.zeros((count, 2), np.int32)
    start = modes.ctypes.data
    paths = np.fromiter(
        map(native.path_mode, handles, range(start, start + 8 * count, 8), range(start + 4, start + 8 * count, 8)), bool, count
    )
    fills, fill_known = _colours(native.object_fill, handles)
    strokes, stroke_known = _colours(native.object_stroke, handles)
    filled, stroked = modes[:, 0] != raw.FPDF_FILLMODE_NONE, modes[:, 1] != 0
    white_fill = fill_known & ((fills[:, :3] > PALE).all(axis=1) | (fills[:, 3] == 0))
    white_stroke = stroke_known & ((strokes[:, :3] > PALE).all(axis=1) | (strokes[:, 3] == 0))
    visible = ~paths | (filled & ~white_fill) | (stroked & ~white_stroke)
    opaque = (paths & filled & (fills[:, 3] > 128)) | (kinds == raw.FPDF_PAGEOBJ_IMAGE) | (kinds == raw.FPDF_PAGEOBJ_SHADING)
    return visible, opaque, ~(paths & fill_known) | (fills[:, :3] @ LUMA < TINT)


def _colours(get: Callable[..., int], handles: list[int]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """RGBA [N, 4] of objects, and whether PDFium knows it (it does not for patterns)."""
    count = len(handles)
    values = np.zeros((count, 4), np.uint32)
    start = values.ctypes.data
    places = [range(start + 4 * i, start + 4 * i + 16 * count, 16) for i in range(4)]
    known = np.fromiter(map(get, handles, *places), bool, count)
    return values.astype(np.float64), known


def _clip_of(handle: int, matrix: Matrix) -> tuple[tuple[float, ...], bool]:
    """Box around what an object's clip paths leave, in page points, and whether some path is more than an upright rectangle."""
    clip = native.object_clip(handle)
    count = native.clip_paths(clip) if clip else 0
    box: tuple[float, ...] = EVERYWHERE
    irregular = False
    x, y = ctypes.c_float(), ctypes.c_float()
    at_x, at_y = ctypes.addressof(x), ctypes.addressof(y)
    a, b, c, d, e, f = matrix
    for path in range(min(count, 8)):
        segments = native.clip_segments(clip, path)
        if segments > MAX_CLIP_SEGMENTS or segments < 1:
            irregular = True
            continue
        xs, ys = [], []
        for i in range(segments):
            native.segment_point(native.clip_segment(clip, path, i), at_x, at_y)
            xs.append(a * x.value + c * y.value + e)
            ys.append(b * x.value + d * y.value + f)
        box = _meet(box, (min(xs), min(ys), max(xs), max(ys)))
        irregular = (
            irregular
            or segments > 5
            or not all(abs(p - q) < 0.01 or abs(r - s) < 0.01 for p, q, r, s in zip(xs, xs[1:], ys, ys[1:], strict=False))
        )
    return box, irregular or count > 8


def _in_layer(handle: int) -> bool:
    """Whether one of an object's marks is that of an optional-content group."""
    buffer = (ctypes.c_ushort * 8)()
    length = ctypes.c_ulong()
    item = ctypes.cast(handle, raw.FPDF_PAGEOBJECT)
    for i in range(min(native.object_marks(handle), 32)):
        mark = raw.FPDFPageObj_GetMark(item, i)
        if (
            raw.FPDFPageObjMark_GetName(mark, buffer, ctypes.sizeof(buffer), ctypes.byref(length))
            and bytes(buffer)[:6] == b"O\0C\0\0\0"
        ):
            return True
    return False


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))


def _cut(boxes: Floats, clip: Floats) -> Floats:
    low = np.maximum(boxes[:, :2], clip[..., :2])
    return np.concatenate([low, np.minimum(boxes[:, 2:], clip[..., 2:])], axis=1)
