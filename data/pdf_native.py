"""PDFium's functions without ctypes' conversions, so that a page's characters and objects are read by loops that run in C.

`list(map(function, repeat(page), range(n), range(base, base + 16 * n, 16)))` costs half a microsecond a call, a tenth of the same
call in a Python loop with structures. Handles are integers here: `address` gives the one of a pypdfium2 object. The functions
keep the interpreter's lock, so they are for processes with one thread, which PDFium needs anyway.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import pypdfium2.raw as raw

_HANDLE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_UNSIGNED = ctypes.c_uint


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    place = ctypes.cast(getattr(raw, name), ctypes.c_void_p).value
    return ctypes.PYFUNCTYPE(result, *arguments)(place)  # type: ignore[arg-type]


def address(handle: Any) -> int:
    """Address of a handle of pypdfium2.raw."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


char_unicode = _bind("FPDFText_GetUnicode", _UNSIGNED, _HANDLE, _INT)
char_loose_box = _bind("FPDFText_GetLooseCharBox", _INT, _HANDLE, _INT, _HANDLE)
char_object = _bind("FPDFText_GetTextObject", ctypes.c_size_t, _HANDLE, _INT)
chars_text = _bind("FPDFText_GetText", _INT, _HANDLE, _INT, _INT, _HANDLE)
char_matrix = _bind("FPDFText_GetMatrix", _INT, _HANDLE, _INT, _HANDLE)
char_origin = _bind("FPDFText_GetCharOrigin", _INT, _HANDLE, _INT, _HANDLE, _HANDLE)
char_font_size = _bind("FPDFText_GetFontSize", ctypes.c_double, _HANDLE, _INT)

page_object = _bind("FPDFPage_GetObject", _HANDLE, _HANDLE, _INT)
form_count = _bind("FPDFFormObj_CountObjects", _INT, _HANDLE)
form_object = _bind("FPDFFormObj_GetObject", _HANDLE, _HANDLE, ctypes.c_ulong)
object_type = _bind("FPDFPageObj_GetType", _INT, _HANDLE)
object_bounds = _bind("FPDFPageObj_GetBounds", _INT, _HANDLE, _HANDLE, _HANDLE, _HANDLE, _HANDLE)
object_matrix = _bind("FPDFPageObj_GetMatrix", _INT, _HANDLE, _HANDLE)
object_fill = _bind("FPDFPageObj_GetFillColor", _INT, _HANDLE, _HANDLE, _HANDLE, _HANDLE, _HANDLE)
object_stroke = _bind("FPDFPageObj_GetStrokeColor", _INT, _HANDLE, _HANDLE, _HANDLE, _HANDLE, _HANDLE)
object_marks = _bind("FPDFPageObj_CountMarks", _INT, _HANDLE)
object_transparent = _bind("FPDFPageObj_HasTransparency", _INT, _HANDLE)
object_set_active = _bind("FPDFPageObj_SetIsActive", _INT, _HANDLE, _INT)
object_clip = _bind("FPDFPageObj_GetClipPath", _HANDLE, _HANDLE)
clip_paths = _bind("FPDFClipPath_CountPaths", _INT, _HANDLE)
clip_segments = _bind("FPDFClipPath_CountPathSegments", _INT, _HANDLE, _INT)
clip_segment = _bind("FPDFClipPath_GetPathSegment", _HANDLE, _HANDLE, _INT, _INT)
segment_point = _bind("FPDFPathSegment_GetPoint", _INT, _HANDLE, _HANDLE, _HANDLE)
path_mode = _bind("FPDFPath_GetDrawMode", _INT, _HANDLE, _HANDLE, _HANDLE)
path_segments = _bind("FPDFPath_CountSegments", _INT, _HANDLE)
text_mode = _bind("FPDFTextObj_GetTextRenderMode", _INT, _HANDLE)
text_font = _bind("FPDFTextObj_GetFont", _HANDLE, _HANDLE)
font_name = _bind("FPDFFont_GetBaseFontName", ctypes.c_size_t, _HANDLE, _HANDLE, ctypes.c_size_t)
font_flags = _bind("FPDFFont_GetFlags", _INT, _HANDLE)
glyph_width = _bind("FPDFFont_GetGlyphWidth", _INT, _HANDLE, _UNSIGNED, _FLOAT, _HANDLE)
