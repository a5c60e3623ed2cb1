"""Small PDFs written by hand, so that tests know exactly what is on each page; coordinates are PDF's, from the bottom left."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TIMES, HELVETICA, COURIER = "F1", "F2", "F3"
BITMAP_PIXEL = 0.12
"""Points of a pixel of F5, at 600 dpi."""


@dataclass(frozen=True)
class Form:
    """A Form XObject; draw it with `place`."""

    content: str
    box: tuple[float, float, float, float] = (0, 0, 595, 842)
    """Clips what is drawn."""
    matrix: tuple[float, ...] = (1, 0, 0, 1, 0, 0)
    layer_off: bool = False
    """Belongs to an optional-content group that is switched off."""


def place(
    name: str, matrix: tuple[float, ...] = (1, 0, 0, 1, 0, 0), clip: tuple[float, float, float, float] | None = None
) -> str:
    """Draw a form, cut to a rectangle (x, y, width, height) if one is given."""
    cut = f"{' '.join(map(str, clip))} re W n " if clip else ""
    return f"q {cut}{' '.join(map(str, matrix))} cm /{name} Do Q\n"


def text(x: float, y: float, line: str, font: str = TIMES, size: float = 10, mode: int = 0, gray: float = 0) -> str:
    """A line of text as page content; mode 3 paints nothing, gray 1 is white."""
    escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT {gray} g {mode} Tr /{font} {size} Tf {x} {y} Td ({escaped}) Tj 0 g ET\n"


def bitmap_text(x: float, y: float, line: str) -> str:
    """A line in F5, a monospaced bitmap font of 10 points whose size in the file is one pixel."""
    escaped = line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT 0 g 0 Tr /F5 1 Tf {BITMAP_PIXEL} 0 0 {BITMAP_PIXEL} {x} {y} Tm ({escaped}) Tj ET\n"


def paragraph(x: float, y: float, lines: list[str], size: float = 10) -> str:
    """Lines at a pitch of 12 points."""
    return "".join(text(x, y - 12 * i, line, size=size) for i, line in enumerate(lines))


def plot(x: float, y: float, width: float, height: float) -> str:
    """A frame, a zigzag and an axis label in another font."""
    zigzag = " ".join(f"{x + width * i / 20} {y + height * (0.2 + 0.6 * (i % 2))} l" for i in range(21))
    frame = f"1 w {x} {y} {width} {height} re S {x} {y} m {zigzag} S\n"
    return frame + text(x + width / 2, y + 4, "axis", HELVETICA, 7)


def rule(x: float, y: float, width: float) -> str:
    """A thin horizontal line."""
    return f"0.5 w {x} {y} m {x + width} {y} l S\n"


def _bitmap_font(number: int, to_unicode: int) -> list[bytes]:
    """Objects of F5: its letters are bars, those with ascenders higher than the others."""
    tall = {code for code in range(33, 127) if not chr(code).islower() or chr(code) in "bdfhklt"}
    shapes = "".join(f"/g{code} {number + (1 if code in tall else 2)} 0 R " for code in range(32, 127))
    names = " ".join(f"/g{code}" for code in range(32, 127))
    widths = " ".join(["48"] * 95)
    font = (
        f"<< /Type /Font /Subtype /Type3 /FontBBox [0 0 0 0] /FontMatrix [1 0 0 1 0 0] /FirstChar 32 /LastChar 126"
        f" /Widths [{widths}] /Encoding << /Type /Encoding /Differences [32 {names}] >> /CharProcs << {shapes}>>"
        f" /Resources << >> /ToUnicode {to_unicode} 0 R >>"
    )
    found = [font.encode()]
    for height in (58, 36):
        shape = f"48 0 4 0 40 {height} d1 4 0 36 {height} re f".encode()
        found.append(f"<< /Length {len(shape)} >>".encode() + b"\nstream\n" + shape + b"\nendstream")
    return found


@lru_cache(maxsize=1)
def _pack(content: str) -> bytes:
    return zlib.compress(content.encode("latin-1"))


def write_pdf(
    path: Path,
    pages: list[str],
    media: tuple[float, float] = (595, 842),
    encrypt: bool = False,
    forms: dict[str, Form] | None = None,
    rotate: int = 0,
    unicode_map: dict[str, int] | None = None,
    inherited: bool = False,
) -> Path:
    """Write pages of content as a PDF with three standard fonts and, for /Layer, a group that is switched off.

    F4 is Times with letters that stand for other code points, those of `unicode_map`. F5 is a bitmap font, see `bitmap_text`.
    `inherited`: the size of the pages stands in the tree of pages.
    """
    objects: list[bytes] = []
    forms = forms or {}
    kids = " ".join(f"{6 + 2 * i} 0 R" for i in range(len(pages)))
    first_form = 6 + 2 * len(pages)
    layer = first_form + len(forms)
    named = " ".join(f"/{name} {first_form + i} 0 R" for i, name in enumerate(forms))
    fonts = f"/F1 3 0 R /F2 4 0 R /F3 5 0 R /F4 {layer + 1} 0 R /F5 {layer + 3} 0 R"
    resources = f"/Resources << /Font << {fonts} >> /XObject << {named} >> /Properties << /Layer {layer} 0 R >> >>"
    objects.append(
        f"<< /Type /Catalog /Pages 2 0 R /OCProperties << /OCGs [{layer} 0 R] /D << /OFF [{layer} 0 R] >> >> >>".encode()
    )
    media_box = f"/MediaBox [0 0 {media[0]} {media[1]}]"
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} {media_box if inherited else ''} >>".encode())
    for name in ("Times-Roman", "Helvetica", "Courier"):
        objects.append(f"<< /Type /Font /Subtype /Type1 /BaseFont /{name} >>".encode())
    for i, content in enumerate(pages):
        packed = _pack(content)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R {'' if inherited else media_box} /Rotate {rotate} /Contents {7 + 2 * i} 0 R"
            f" {resources} >>".encode()
        )
        head = f"<< /Length {len(packed)} /Filter /FlateDecode >>".encode()
        objects.append(head + b"\nstream\n" + packed + b"\nendstream")
    for form in forms.values():
        packed = _pack(form.content)
        off = f" /OC {layer} 0 R" if form.layer_off else ""
        head = (
            f"<< /Type /XObject /Subtype /Form /BBox [{' '.join(map(str, form.box))}] /Matrix [{' '.join(map(str, form.matrix))}]"
            f" {resources}{off} /Length {len(packed)} /Filter /FlateDecode >>"
        )
        objects.append(head.encode() + b"\nstream\n" + packed + b"\nendstream")
    objects.append(b"<< /Type /OCG /Name (layer) >>")
    objects.append(f"<< /Type /Font /Subtype /Type1 /BaseFont /Times-Roman /ToUnicode {layer + 2} 0 R >>".encode())
    codes = {code: code for code in range(32, 127)} | {ord(letter): code for letter, code in (unicode_map or {}).items()}
    lines = "".join(f"<{code:02x}> <{chr(to).encode('utf-16-be').hex()}>\n" for code, to in codes.items())
    cmap = (
        f"begincmap 1 begincodespacerange <00> <ff> endcodespacerange {len(codes)} beginbfchar\n{lines}endbfchar endcmap".encode()
    )
    objects.append(f"<< /Length {len(cmap)} >>".encode() + b"\nstream\n" + cmap + b"\nendstream")
    objects += _bitmap_font(layer + 3, layer + 2)
    if encrypt:
        secret = "<" + "41" * 32 + ">"
        objects.append(f"<< /Filter /Standard /V 1 /R 2 /O {secret} /U {secret} /P -4 >>".encode())
    out = bytearray(b"%PDF-1.5\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010d} 00000 n \n".encode() for offset in offsets)
    extra = f" /Encrypt {len(objects)} 0 R /ID [<00> <00>]" if encrypt else ""
    out += f"trailer << /Size {len(objects) + 1} /Root 1 0 R{extra} >>\nstartxref\n{table}\n%%EOF\n".encode()
    path.write_bytes(out)
    return path


def column(x: float, top: float, count: int) -> str:
    """A column of `count` lines of running text, the first one at `top`."""
    words = [
        "This is running text in one of the two columns,",
        "which has lines of about one width and a pitch",
        "that does not change from the first to the last",
    ]
    return "".join(text(x, top - 12 * i, words[i % 3]) for i in range(count))
