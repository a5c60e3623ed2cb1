"""How each text object of a PDF page is set: font, size, whether it is monospaced, which way it is read."""

import ctypes
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moexpand.data import pdf_native as native
from moexpand.data.pdf_objects import Floats, Matrix, combine

MONO_NAMES = ("mono", "courier", "typewriter", "cmtt", "cmsltt", "sftt", "sfst", "ectt", "lmtt", "consol", "inconsola", "txtt")
FIXED_PITCH = 1
NARROW, WIDE = "il.tj", "mMwW"
"""Letters that differ in width in every font that is not monospaced."""
ASCENDER = 0.7
"""Height of a letter such as "l" or "H", in parts of the font size."""
DESCENDER = 0.2
LEAST_LETTERS = 6
"""Different letters of a font that tell by their widths whether it is monospaced."""


@dataclass(frozen=True)
class Font:
    """How a text object is set."""

    name: str
    mono: bool
    size: float
    turn: int
    slanted: bool
    """Neither upright nor turned by quarters."""
    handle: int = 0
    """Of PDFium's font where the font has no name, else 0."""


def read_fonts(text_page: int, handles: list[int], characters: NDArray[np.int64], page: Matrix) -> list[Font]:
    """Font of each text object.

    Args:
        text_page: address of PDFium's text page.
        handles: text objects, [O].
        characters: number of one character of each, [O].
        page: from PDF space to points from the top left.
    """
    names: dict[int, tuple[str, bool]] = {}
    fonts = []
    values = (ctypes.c_float * 6)()
    at = ctypes.addressof(values)
    for handle, character in zip(handles, characters.tolist(), strict=True):
        size = native.char_font_size(text_page, character)
        turn, slanted = 0, False
        if native.char_matrix(text_page, character, at):
            a, b, c, d, _, _ = combine((values[0], values[1], values[2], values[3], 0.0, 0.0), page)
            size *= max((c * c + d * d) ** 0.5, 1e-3)
            # The page's y grows downwards, so a baseline that rises has a negative b.
            slanted = min(abs(a), abs(b)) > 0.1 * max(abs(a), abs(b))
            turn = (0 if a >= 0 else 2) if abs(a) >= abs(b) else (1 if b < 0 else 3)
        font = native.text_font(handle) if handle else None
        key = font or 0
        if key not in names:
            names[key] = _name(font) if font else ("", False)
        name, mono = names[key]
        nameless = key if not name and not turn and not slanted else 0
        # A bitmap font keeps its whole size until its letters are measured.
        size = size if nameless else round(size * 2) / 2
        fonts.append(Font(name, mono, size, turn, slanted, nameless))
    return fonts


def _name(font: int) -> tuple[str, bool]:
    """Name of a font without the tag of its subset, and whether it is monospaced."""
    buffer = ctypes.create_string_buffer(128)
    length = native.font_name(font, ctypes.addressof(buffer), 128)
    text = buffer.value.decode("utf-8", "replace") if length <= 128 else ""
    name = text.split("+")[-1]
    mono = bool(max(native.font_flags(font), 0) & FIXED_PITCH) or any(part in name.lower() for part in MONO_NAMES)
    return name, mono or _has_one_width(font)


def _has_one_width(font: int) -> bool:
    """Narrow and wide letters of the font have one width; many fonts of listings neither say so nor have a telling name."""
    value = ctypes.c_float()

    def widths(letters: str) -> list[float]:
        found = []
        for letter in letters:
            value.value = 0.0
            if native.glyph_width(font, ord(letter), 100.0, ctypes.addressof(value)) and value.value > 0:
                found.append(value.value)
        return found

    narrow, wide = widths(NARROW), widths(WIDE)
    return len(narrow) > 1 and bool(wide) and max(narrow + wide) - min(narrow + wide) < 1.0


def fit_bitmap_fonts(
    fonts: list[Font],
    text_page: int,
    characters: NDArray[np.int64],
    codes: NDArray[np.int64],
    owner: NDArray[np.int64],
    boxes: Floats,
    page: Matrix,
) -> list[Font]:
    """Give bitmap fonts (Type 3, without a name) the size that their letters have, and their characters boxes of that size.

    The unit of such a font is often a pixel, so that the size in the file says nothing, and a character's box is that of its ink.

    Args:
        fonts: of the text objects, [O].
        text_page: address of PDFium's text page.
        characters: numbers of the characters that count, [N].
        codes: code point of every character.
        owner: text object of each of `characters`, [N].
        boxes: of every character; those of bitmap fonts are changed in place.
        page: from PDF space to points from the top left.
    """
    handles = np.array([font.handle for font in fonts], np.int64)
    sizes = np.array([font.size for font in fonts])
    fitted = list(fonts)
    for handle in np.unique(handles[handles != 0]).tolist():
        mine = np.flatnonzero(handles[owner] == handle)
        chosen = characters[mine]
        box, size = boxes[chosen], sizes[owner[mine]].clip(1e-3)
        # Most tall letters are ascenders and capitals; of ten letters one is.
        scale = float(np.percentile((box[:, 3] - box[:, 1]) / size, 90)) / ASCENDER
        mono = False
        if scale > 2.0:
            mono = _measured_mono(codes[chosen], (box[:, 2] - box[:, 0]) / size)
            base = _baselines(text_page, chosen, page)
            boxes[chosen, 1], boxes[chosen, 3] = base - ASCENDER * scale * size, base + DESCENDER * scale * size
        for i in np.flatnonzero(handles == handle).tolist():
            whole = fonts[i].size * (scale if scale > 2.0 else 1.0)
            fitted[i] = replace(fonts[i], size=round(whole * 2) / 2, mono=fonts[i].mono or mono)
    return fitted


def _measured_mono(codes: NDArray[np.int64], widths: Floats) -> bool:
    """Whether different letters all are equally wide."""
    letters = ((codes >= ord("a")) & (codes <= ord("z"))) | ((codes >= ord("A")) & (codes <= ord("Z")))
    if len(np.unique(codes[letters])) < LEAST_LETTERS:
        return False
    low, high = np.percentile(widths[letters], [5, 95])
    return bool(high - low < 0.05 * high)


def _baselines(text_page: int, characters: NDArray[np.int64], page: Matrix) -> Floats:
    """Height of each character's origin, in points from the top."""
    x, y = ctypes.c_double(), ctypes.c_double()
    at_x, at_y = ctypes.addressof(x), ctypes.addressof(y)
    found = np.zeros(len(characters))
    for i, character in enumerate(characters.tolist()):
        native.char_origin(text_page, character, at_x, at_y)
        found[i] = page[1] * x.value + page[3] * y.value + page[5]
    return found


def styles_of(fonts: list[Font]) -> tuple[NDArray[np.int64], list[Font]]:
    """Number of each object's font among the page's distinct ones."""
    numbers: dict[Font, int] = {}
    of_object = np.array([numbers.setdefault(font, len(numbers)) for font in fonts], np.int64)
    return of_object, list(numbers)
