"""Characters of a PDF page as lines with boxes, fonts and sizes. Needs pypdfium2 alone.

Coordinates everywhere in the PDF stage: points (1/72 inch), origin at the top left of the visible page, y downwards, after the
page's own rotation; a box is (x0, y0, x1, y1).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import pypdfium2 as pdfium
import pypdfium2.raw as raw

Box = tuple[float, float, float, float]

INVISIBLE = (raw.FPDF_TEXTRENDERMODE_INVISIBLE, raw.FPDF_TEXTRENDERMODE_CLIP)
HYPHENS = "\xad\x02\ufffe"
"""What PDFium gives for a hyphen at the end of a line."""
LIGATURES = str.maketrans({0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xA0: " "})
MONO_NAMES = ("mono", "courier", "typewriter", "cmtt", "cmsltt", "sftt", "sfst", "ectt", "lmtt", "consol", "inconsola", "txtt")
FIXED_PITCH = 1


@dataclass
class Line:
    """A run of characters on one baseline without a wide gap."""

    text: str
    x0: float
    y0: float
    x1: float
    y1: float
    size: float
    """Font size in points, rounded to 0.5."""
    font: str
    mono: bool
    page: int = 0

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1)"""
        return (self.x0, self.y0, self.x1, self.y1)

    @property
    def width(self) -> float:
        """Points."""
        return self.x1 - self.x0

    @property
    def middle(self) -> float:
        """Height of the line's middle."""
        return (self.y0 + self.y1) / 2


@dataclass
class _Run:
    """A line while its characters are collected."""

    places: list[int] = field(default_factory=list)
    """Numbers of the characters that are not spaces."""
    characters: list[str] = field(default_factory=list)
    x0: float = 1e9
    x1: float = -1e9
    tops: list[float] = field(default_factory=list)
    bottoms: list[float] = field(default_factory=list)
    end: float = 0.0

    def height(self) -> tuple[float, float]:
        """Median top and bottom: one tall sign of a mathematical font must not make the whole line tall."""
        middle = len(self.tops) // 2
        return sorted(self.tops)[middle], sorted(self.bottoms)[middle]


def page_transform(page: pdfium.PdfPage) -> tuple[Callable[[float, float, float, float], Box], float, float]:
    """How to turn (left, bottom, right, top) of PDF space into a box, and the width and height of the page in points."""
    left, bottom, right, top = page.get_cropbox()
    rotation = page.get_rotation()
    width, height = page.get_size()

    def transform(x0: float, y0: float, x1: float, y1: float) -> Box:
        if rotation == 90:
            return (y0 - bottom, x0 - left, y1 - bottom, x1 - left)
        if rotation == 180:
            return (right - x1, y0 - bottom, right - x0, y1 - bottom)
        if rotation == 270:
            return (top - y1, right - x1, top - y0, right - x0)
        return (x0 - left, top - y1, x1 - left, top - y0)

    return transform, width, height


def read_lines(page: pdfium.PdfPage, hidden: bool) -> list[Line]:
    """All visible lines of a page, in the order of the content stream.

    Args:
        page: an open page.
        hidden: the page has text objects that are painted invisibly; their characters are left out.
    """
    transform, width, height = page_transform(page)
    text_page = page.get_textpage()
    try:
        return _lines_of(text_page.raw, transform, width, height, hidden)
    finally:
        text_page.close()


def _lines_of(text_page: ctypes.c_void_p, transform: Callable[..., Box], width: float, height: float, hidden: bool) -> list[Line]:
    rect = raw.FS_RECTF()
    pointer = ctypes.byref(rect)
    get_unicode, get_box = raw.FPDFText_GetUnicode, raw.FPDFText_GetLooseCharBox
    lines: list[Line] = []
    run: _Run | None = None

    def close() -> None:
        nonlocal run
        if run is not None and (text := "".join(run.characters).strip()):
            lines.append(_finish(text_page, run, text))
        run = None

    for i in range(raw.FPDFText_CountChars(text_page)):
        code = get_unicode(text_page, i)
        if code in (10, 13):
            close()
            continue
        if code == 0 or not get_box(text_page, i, pointer):
            continue
        if hidden and _is_invisible(text_page, i):
            continue
        x0, y0, x1, y1 = transform(rect.left, rect.bottom, rect.right, rect.top)
        character = chr(code).translate(LIGATURES)
        if character in HYPHENS:
            character = "-"
        if character == " ":
            if run is not None and run.characters[-1] != " ":
                run.characters.append(" ")
            continue
        if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
            continue
        em = max(y1 - y0, 1.0)
        if run is not None:
            overlap = min(y1, run.bottoms[-1]) - max(y0, run.tops[-1])
            if overlap < 0.25 * em or x0 - run.end > 1.8 * em or x0 < run.end - 1.5 * em:
                close()
        if run is None:
            run = _Run()
        run.places.append(i)
        run.characters.append(character)
        run.x0, run.x1 = min(run.x0, x0), max(run.x1, x1)
        run.tops.append(y0)
        run.bottoms.append(y1)
        run.end = x1
    close()
    return lines


def _is_invisible(text_page: ctypes.c_void_p, character: int) -> bool:
    owner = raw.FPDFText_GetTextObject(text_page, character)
    return bool(owner) and raw.FPDFTextObj_GetTextRenderMode(owner) in INVISIBLE


def _finish(text_page: ctypes.c_void_p, run: _Run, text: str) -> Line:
    """Font and size by vote of the first, the middle and the last character: one alone is too often a word in another font."""
    places = (run.places[len(run.places) // 2], run.places[0], run.places[-1])
    fonts = [_font(text_page, place) for place in places]
    font, flags, size = max(fonts, key=fonts.count)
    mono = bool(flags & FIXED_PITCH) or any(name in font.lower() for name in MONO_NAMES)
    top, bottom = run.height()
    return Line(text, run.x0, top, run.x1, bottom, size, font, mono)


def _font(text_page: ctypes.c_void_p, place: int) -> tuple[str, int, float]:
    """Name, descriptor flags and size in points (text matrix included) of a character's font."""
    size = raw.FPDFText_GetFontSize(text_page, place)
    matrix = raw.FS_MATRIX()
    if raw.FPDFText_GetMatrix(text_page, place, ctypes.byref(matrix)):
        size *= max((matrix.c**2 + matrix.d**2) ** 0.5, 1e-3)
    buffer = ctypes.create_string_buffer(128)
    flags = ctypes.c_int()
    raw.FPDFText_GetFontInfo(text_page, place, buffer, 128, ctypes.byref(flags))
    return buffer.value.decode("utf-8", "replace").split("+")[-1], flags.value, round(size * 2) / 2
