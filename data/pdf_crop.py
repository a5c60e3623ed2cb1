"""Rendering of a region of a PDF's page to a PNG file, trimmed of white margins."""

from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
from numpy.typing import NDArray
from PIL import Image

from moexpand.data.pdf_text import Box

MAX_PIXELS = 16_000_000
"""Of one picture; larger regions are rendered at a lower resolution."""
PAD = 3.0
"""Points of white kept around the ink."""
INK = 6
"""Levels below white from which a pixel counts as ink."""
COMPRESSION = 3
"""Of zlib: half the time of level 6 for the same size on plots."""


def crop(
    page: pdfium.PdfPage, region: Box, dpi: int, smallest: float, path: Path, turn: int = 0, whole_rows: bool = False
) -> str | None:
    """Render a region to a file; in shades of gray where it has no colours. Annotations and forms are not drawn.

    Args:
        page: open page.
        region: in points from the top left.
        dpi: pixels an inch.
        smallest: side in points below which the ink is no picture.
        path: PNG file to write.
        turn: quarter turns counterclockwise of the text on the page; the picture is turned back.
        whole_rows: leave out ink at the upper and lower edge that white parts from the rest: a slice of the next line.

    Returns:
        None, or why there is no file: `too_small`, `blank` or `not_rendered`.
    """
    x0, y0, x1, y1 = region
    if min(x1 - x0, y1 - y0) < 1.0:
        return "too_small"
    scale = min(dpi / 72, (MAX_PIXELS / ((x1 - x0) * (y1 - y0))) ** 0.5)
    width, height = page.get_size()
    margins = (max(x0, 0.0), max(height - y1, 0.0), max(width - x1, 0.0), max(y0, 0.0))
    try:
        bitmap = page.render(scale=scale, crop=margins, may_draw_forms=False, draw_annots=False, rev_byteorder=True)
        pixels: NDArray[np.uint8] = bitmap.to_numpy()[..., :3]
    except (pdfium.PdfiumError, ValueError):
        return "not_rendered"
    if whole_rows:
        pixels = _without_slices(pixels)
    ink = _ink(pixels)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return "blank"
    if min(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 < smallest * scale:
        return "too_small"
    pad = round(PAD * scale)
    kept = pixels[max(rows[0] - pad, 0) : rows[-1] + pad + 1, max(columns[0] - pad, 0) : columns[-1] + pad + 1]
    kept = np.rot90(kept, -turn) if turn else kept
    coloured = (kept[..., 0] != kept[..., 1]).any() or (kept[..., 1] != kept[..., 2]).any()
    picture = Image.fromarray(np.ascontiguousarray(kept if coloured else kept[..., 0]))
    picture.save(path, "PNG", compress_level=COMPRESSION)
    return None


def _ink(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels of [H, W, 3] are not white, [H, W]."""
    # Much faster than a minimum over the short last axis.
    return np.minimum(np.minimum(pixels[..., 0], pixels[..., 1]), pixels[..., 2]) < 255 - INK


def _without_slices(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture [H, W, 3] from its first to its last white row, if there is ink between them."""
    inked: NDArray[np.bool_] = np.asarray(_ink(pixels).any(axis=1))
    white = np.flatnonzero(~inked)
    if not len(white) or not inked[white[0] : white[-1]].any():
        return pixels
    return pixels[white[0] : white[-1] + 1]
