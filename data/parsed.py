"""Documents that another tool has parsed, to the records that our own extraction of PDFs makes.

parsed_mineru.py and parsed_docling.py turn a tool's JSON into a `Parsed`; everything below is the same for both: which figures
are kept, what becomes of the text of those that are not, which paragraphs mention them. The files are untrusted: sizes are
bounded, nothing outside the document's folder is read, and what is not as it should be ends under a reason that is counted.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from moexpand.data.document import MAX_PAGES, DocumentLimits, Refused, equation_pattern, figure_pattern, mentions_of, write_result
from moexpand.data.image_decode import DEFAULT_LIMITS, BadImage, decode_image, image_size
from moexpand.data.named_files import file_inside, picture_content, picture_ending
from moexpand.data.parts import Unusable
from moexpand.data.pdf_labels import label_of
from moexpand.data.pdf_text import UNSEEN, Box
from moexpand.data.tally import Tally

MAX_JSON_BYTES = 256 << 20
"""Of a JSON file; parsing takes several times as much memory, and a process has 1.5 GiB."""
LARGEST_NUMBER = 1e6
"""Of a coordinate or a page's side."""
_UNSEEN = re.compile("[\x00" + "".join(f"{chr(first)}-{chr(last)}" for first, last in UNSEEN) + "]")
_TAG = re.compile(r"\\tag\s*\*?\s*\{\s*([^{}]{1,20}?)\s*\}")
_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,", re.I)


@dataclass(frozen=True)
class Picture:
    """Where the pixels of a figure are."""

    uri: str
    """A path below the document's folder, or a data: URI with base64."""
    crop: Box | None = None
    """The figure's part of that picture, in fractions of its width and height; None for all of it."""


@dataclass
class Paragraph:
    """A piece of running text."""

    text: str
    page: int | None


@dataclass
class Figure:
    """A figure, table or equation where it stands among the paragraphs; an equation follows the paragraph of its formula."""

    kind: str
    page: int | None
    """From 1."""
    box: Box | None
    """Points from the top left of the page; None where the page's size is not known."""
    picture: Picture | None
    caption: str = ""
    notes: str = ""
    """Footnotes of a figure or table, which follow its caption."""
    inner: str = ""
    number: str = ""
    """Of an equation; that of a figure is in its caption."""
    html: str = ""


@dataclass
class Parsed:
    """A document in reading order."""

    items: list[Paragraph | Figure] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)
    """Numbers from 1; empty where the format has no pages."""

    def add_text(self, text: str, page: int | None) -> None:
        """Add a paragraph, unless nothing can be seen of it."""
        if text := clean(text):
            self.items.append(Paragraph(text, page))


def extract_parsed(path: str, folder: str, limits: DocumentLimits, read: Callable[[Path], Parsed]) -> None:
    """Extract one parsed document into a folder; see document.py for what is written there.

    Args:
        path: the tool's JSON.
        folder: an existing, empty folder.
        limits: smallest figure, whether equations are wanted.
        read: the tool's reader, which raises `Refused` for a file that is not as it should be.
    """
    out = Path(folder)
    pages, figures = Tally(), Tally()
    reason = None
    records: list[dict[str, Any]] = []
    try:
        parsed = read(Path(path))
        records = _records(parsed, _Pictures(Path(path), out), limits, pages, figures)
    except Refused as refusal:
        reason = str(refusal)
        pages, figures = Tally(), Tally()
    write_result(out, records, reason, pages, figures)


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        Refused: `too_large`, beyond `MAX_JSON_BYTES`; `not_json`, also where it is nested too deeply to be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise Refused("too_large")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Refused("not_json") from None


def clean(text: str) -> str:
    """Without characters that have no shape, and without white space at the ends."""
    return _UNSEEN.sub("", text).strip()


def split_caption(pieces: list[str]) -> tuple[str, list[str]]:
    """The caption, from the piece that begins with a label such as "Figure 3" where there is one, and the pieces before it."""
    start = next((place for place, piece in enumerate(pieces) if label_of(piece)[1]), 0)
    return " ".join(pieces[start:]), pieces[:start]


def tag_of(formula: str) -> str:
    r"""Number that a formula in LaTeX gives itself by \tag{...}; an empty string where it has none."""
    match = _TAG.search(formula)
    return match[1].strip("()") if match else ""


def numbers(values: Any, count: int) -> list[float] | None:
    """`count` numbers of a sensible size, or None."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
            return None
    return [float(value) for value in values]


class _Pictures:
    """Reads the pictures of one document and puts them into the folder of its records."""

    def __init__(self, document: Path, out: Path) -> None:
        self._home, self._artifacts, self._out = document.parent, f"{document.stem}_artifacts", out
        self._kept: dict[Picture, str] = {}
        self._decoded: tuple[str, Image.Image] | None = None

    def keep(self, picture: Picture | None, kind: str, page: int | None) -> str:
        """Write a figure's picture; returns the name of its file.

        Raises:
            Unusable, BadImage: it cannot be used, or there is none.
        """
        if picture is None or not picture.uri:
            raise Unusable("no_picture", "the document holds no picture of it")
        if picture in self._kept:
            return self._kept[picture]  # named a million times, it still takes the disk once
        content = self._content(picture.uri) if picture.crop is None else self._part(picture.uri, picture.crop)
        image_size(content)
        name = f"{kind}-{page or 0:04d}-{len(self._kept) + 1:05d}.{picture_ending(content)}"
        (self._out / name).write_bytes(content)
        self._kept[picture] = name
        return name

    def _content(self, uri: str) -> bytes:
        match = _DATA_URI.match(uri)
        if match:
            if len(uri) > DEFAULT_LIMITS.bytes * 4 // 3 + 100:
                raise BadImage("too_many_bytes", f"The picture has more than {DEFAULT_LIMITS.bytes} bytes.")
            try:
                return base64.b64decode(uri[match.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise BadImage("broken", "The picture is no base64.") from None
        name = uri
        if uri.startswith("/") or uri.lower().startswith("file:"):
            # docling writes absolute paths where it was given one; the folder may lie elsewhere by now.
            name = f"{self._artifacts}/{uri.rsplit('/', 1)[-1]}"
            if not (self._home / self._artifacts).is_dir():
                raise Unusable("image_outside", f"the picture {uri[:200]!r} is not a path inside the folder of its file")
        return picture_content(file_inside(self._home, name))

    def _part(self, uri: str, crop: Box) -> bytes:
        """A part of a page's picture, as PNG; neighbours on a page decode it once."""
        if self._decoded is None or self._decoded[0] != uri:
            self._decoded = (uri, decode_image(self._content(uri)))
        image = self._decoded[1]
        left, top = max(math.floor(crop[0] * image.width), 0), max(math.floor(crop[1] * image.height), 0)
        right, bottom = min(math.ceil(crop[2] * image.width), image.width), min(math.ceil(crop[3] * image.height), image.height)
        if left >= right or top >= bottom:
            raise Unusable("no_picture", "its box lies off the picture of its page")
        written = BytesIO()
        image.crop((left, top, right, bottom)).save(written, "PNG")
        return written.getvalue()


def _records(parsed: Parsed, pictures: _Pictures, limits: DocumentLimits, pages: Tally, figures: Tally) -> list[dict[str, Any]]:
    for page in parsed.pages:
        if page <= MAX_PAGES:
            pages.keep()
        else:
            pages.drop("beyond_page_limit")
    texts: list[Paragraph] = []
    kept: list[tuple[Figure, str, int]] = []
    for item in parsed.items:
        if item.page is not None and item.page > MAX_PAGES:
            continue
        if isinstance(item, Paragraph):
            texts.append(item)
        elif item.kind != "equation" or limits.equations:
            try:
                kept.append((item, _usable(item, pictures, limits), len(texts)))
                figures.keep()
            except (Unusable, BadImage) as problem:
                figures.drop(f"image_{problem.reason}" if isinstance(problem, BadImage) else problem.reason)
                texts += _left_over(item)
    if not texts and not kept:
        raise Refused("no_text")
    records: list[dict[str, Any]] = [{"kind": "text", "page": text.page, "text": text.text} for text in texts]
    paragraphs = [text.text for text in texts]
    return records + [_record(figure, image, place, paragraphs) for figure, image, place in kept]


def _usable(figure: Figure, pictures: _Pictures, limits: DocumentLimits) -> str:
    """File of a figure's picture.

    Raises:
        Unusable, BadImage: the figure is dropped under this reason.
    """
    if figure.kind != "equation" and not figure.caption:
        raise Unusable("no_caption", "nothing would be said of it")
    if figure.box is not None:
        x0, y0, x1, y1 = figure.box
        if min(x1 - x0, y1 - y0) < limits.smallest(figure.kind):
            raise Unusable("too_small", "a side is short")
    return pictures.keep(figure.picture, figure.kind, figure.page)


def _left_over(figure: Figure) -> list[Paragraph]:
    """What stays in the running text of a figure that is dropped: its caption, and the cells of a table."""
    if figure.kind == "equation":
        return []
    texts = (figure.caption, figure.inner if figure.kind == "table" else "", figure.notes)
    return [Paragraph(text, figure.page) for text in texts if text]


def _record(figure: Figure, image: str, place: int, paragraphs: list[str]) -> dict[str, Any]:
    """A record as document.py describes it.

    Args:
        place: number of paragraphs before the figure.
    """
    if figure.kind == "equation":
        number = figure.number
        mentions = mentions_of(number, equation_pattern(number), paragraphs) if number else []
        # Before an equation stand the paragraph of its formula and the one that leads to it.
        around = paragraphs[max(place - 2, 0) : place + 1]
        text = list(dict.fromkeys([*around, *mentions]))
    else:
        label, number = label_of(figure.caption)
        mentions = mentions_of(number, figure_pattern(label, number), paragraphs) if number else []
        text = [figure.caption, *([figure.notes] if figure.notes else []), *mentions]
    record: dict[str, Any] = {
        "kind": figure.kind,
        "text": "\n\n".join(text),
        "caption": figure.caption,
        "number": number,
        "page": figure.page,
        "box": None if figure.box is None else [round(value, 1) for value in figure.box],
        "mentions": mentions,
        "inner_text": figure.inner,
        "image": image,
    }
    return record | ({"html": figure.html} if figure.html else {})
