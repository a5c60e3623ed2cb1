"""A contact sheet: the pictures and time series of a shard folder with their texts, as one HTML file that needs nothing else."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.base.files import write_atomic
from moexpand.data.dataset import Corpus, Unreadable
from moexpand.data.image_decode import BadImage, decode_image
from moexpand.data.series import BadSeries, read_series

THUMBNAIL = 360
"""Longest side in pixels."""
CHARACTERS = 700
CURVE = (360, 120)
"""Width and height of the curve of a time series."""
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fafafa; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1.2em; }
figure { margin: 0; padding: .8em; background: #fff; border: 1px solid #ddd; border-radius: 4px; }
img, svg { max-width: 100%; display: block; margin: 0 auto .6em; }
h2 { font-size: 12px; font-weight: 600; color: #666; margin: 0 0 .6em; overflow-wrap: anywhere; }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_sheet(shards: str, path: Path, samples: int) -> int:
    """Write a sheet of pictures, and of time series as curves of their first channel, spread evenly over the set.

    Args:
        shards: folder or address.
        path: HTML file, replaced where it exists.
        samples: at most so many, each with all of its pictures and series.

    Returns:
        How many samples are on it.

    Raises:
        InputError: the shards are damaged, hold neither picture nor series, or the file's folder does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"The folder {path.parent} of sheet={path} does not exist.")
    corpus = Corpus(shards)
    pictured = np.flatnonzero(np.diff(corpus.image_first) + np.diff(corpus.series_first))
    if len(pictured) == 0:
        raise InputError(f"{shards} holds no picture and no time series, so there is no contact sheet to write.")
    chosen = pictured[np.linspace(0, len(pictured) - 1, min(samples, len(pictured))).astype(int)]
    figures = "\n".join(_figure(corpus, int(sample)) for sample in chosen)
    title = html.escape(f"{shards}: {len(chosen)} of {len(pictured)} samples with pictures or time series")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>
<body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""
    write_atomic(path, page)
    return len(chosen)


def _figure(corpus: Corpus, sample: int) -> str:
    heading = html.escape(f"{corpus.key[sample].decode()} · {corpus.kind[sample].decode()} · {corpus.tokens[sample]} tokens")
    try:
        content = corpus.content(sample, images=True, series=True)
        pictures = "".join([*map(_picture, content.images), *map(_curve, content.series)])
        text = "".join(part.get("text", "") for part in content.parts).strip()
    except Unreadable as problem:
        pictures, text = "", str(problem)
    shown = text if len(text) <= CHARACTERS else text[:CHARACTERS] + " …"
    return f"<figure><h2>{heading}</h2>{pictures}<p>{html.escape(shown)}</p></figure>"


def _picture(content: bytes) -> str:
    try:
        picture = decode_image(content)
    except BadImage as problem:
        return f"<p>{html.escape(str(problem))}</p>"
    size = f"{picture.width} x {picture.height}"
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    picture.convert("RGB").save(small, "PNG", optimize=True)
    return f'<img alt="{size}" title="{size}" src="data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}">'


def _curve(content: bytes) -> str:
    """The first channel of a time series: of the points that share a column of pixels the lowest and the highest."""
    try:
        values = read_series(content)
    except BadSeries as problem:
        return f"<p>{html.escape(str(problem))}</p>"
    width, height = CURVE
    columns = np.array_split(values[:, 0], min(len(values), width))
    ends = np.array([(column.min(), column.max()) for column in columns], dtype=np.float64)
    low, high = ends.min(), ends.max()
    x = np.repeat(np.linspace(0, width, len(columns)), 2)
    y = height - (ends.reshape(-1) - low) / max(high - low, 1e-12) * height
    points = " ".join(f"{left:.1f},{top:.1f}" for left, top in zip(x, y, strict=True))
    size = f"{len(values)} points, {values.shape[1]} channels"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 -2 {width} {height + 4}"><title>{size}</title>'
        f'<polyline points="{points}" fill="none" stroke="#246" stroke-width="1"/></svg>'
    )
