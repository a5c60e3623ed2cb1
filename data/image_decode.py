"""Pictures from untrusted bytes: PNG, JPEG and WEBP alone, bounded before anything is decoded, as 8-bit RGB.

The format is taken from the first bytes, never from a name, and handed to Pillow's reader of exactly that format: no other
reader is tried, and none of these runs a program or opens a file. Size and frames are read from the header and checked before
memory for pixels is asked for; parts (chunks, segments, scans) are counted, since a small file can hold millions. Whatever is
refused raises `BadImage` with a reason that can be counted; no refusal is only a warning.

A picture is turned upright by the orientation (EXIF, XMP) that stands before its pixels, as transformers' `load_image` does,
since captions describe the upright picture. A damaged orientation counts as none; one that follows a PNG's pixels is not looked
for, so that `image_size` never has to decode. A JPEG with more pictures behind the first (previews, stereo, gain maps) is its
first picture. Animations are refused: which frame a caption means is not known.
"""

import re
import struct
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from moexpand.base.errors import InputError

REASONS = ("unknown_format", "too_many_bytes", "too_many_pixels", "too_many_parts", "animated", "broken", "aspect")
"""Every reason of `BadImage`, to count by."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of this EXIF orientation upright; 5 to 8 swap height and width."""
ORIENTATION = 0x0112
SCAN = b"\xff\xda"
"""Begins a scan of a JPEG. Within a scan's data FF is followed by 00 or is a marker."""
SCANS = 100
"""Most scans of a JPEG: encoders write about 10, and each can cost a walk over all pixels."""
MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""Of a JPEG, restarts aside."""
MARKERS = 2000
"""Most markers of a JPEG that is searched for scans."""
HEADER_READS = 1000
"""Most reads of a header, about three a chunk or segment."""
BYTES_A_READ = 256
"""While decoding, a read more for each so many bytes: encoders write PNG chunks of 8 KiB and more."""


class BadImage(Exception):
    """A picture that cannot be used: a sample to count under `reason`, not a reason to stop."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        """One of `REASONS`."""
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class DecodeLimits:
    """What a picture may cost before it is refused."""

    pixels: int = 50_000_000
    """Height times width; an A4 page at 600 dpi has 35 million. Decoding takes 4 to 24 bytes of memory a pixel."""
    bytes: int = 1 << 26
    """Of the file."""

    def __post_init__(self) -> None:
        for name in ("pixels", "bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"The limit of {name} a picture is {getattr(self, name)}; it must be at least 1.")


DEFAULT_LIMITS = DecodeLimits()


class _CountedReads(BytesIO):
    """A file that can only be read in so many pieces: readers loop over chunks, segments and stray bytes in Python."""

    left = HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadImage("too_many_parts", "The picture's file is made of too many small parts.")
        return super().read(size)


class _Png(PngImageFile):
    """Without the chunks behind the pixels, which change nothing here and may be many."""

    def load_end(self) -> None:
        pass


def image_size(content: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Height and width of the upright picture, from the header alone.

    Raises:
        BadImage: as `decode_image`, as far as the header shows it; damaged pixels are only found by decoding.
    """
    return _open(content, limits)[1]


def decode_image(content: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Image.Image:
    """The upright picture in mode RGB, 8 bits a channel, of the size that `image_size` gives; `numpy.asarray` makes it [H, W, 3].

    Args:
        content: a whole file.
        limits: what is refused without decoding.

    Raises:
        BadImage: not PNG, JPEG or WEBP (`unknown_format`), beyond a limit (`too_many_bytes`, `too_many_pixels`,
            `too_many_parts`), `animated`, or damaged or cut short (`broken`).
    """
    image, size, orientation = _open(content, limits)
    try:
        image.load()
        upright = to_rgb(image)
        if orientation in UPRIGHT:
            upright = upright.transpose(UPRIGHT[orientation])
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise _broken(error) from error
    if (upright.height, upright.width) != size:
        raise BadImage("broken", f"The picture's header says {size}, its pixels {(upright.height, upright.width)}.")
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, as transformers' `convert_to_rgb` makes it: transparency, of whatever kind, over white; the rest by Pillow.

    So palettes are looked up, CMYK is converted without a colour profile, 16-bit colour loses its lower bytes, and of 16-bit grey
    all values above 255 become white: such pictures should be scaled to 8 bits before they are put into shards.
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB") if image.mode != "RGB" else image


def _open(content: bytes, limits: DecodeLimits) -> tuple[ImageFile.ImageFile, tuple[int, int], int]:
    """Header alone: the picture before decoding, upright (height, width), EXIF orientation."""
    if len(content) > limits.bytes:
        raise BadImage("too_many_bytes", f"The picture's file has {len(content)} bytes; {limits.bytes} are allowed.")
    reader = _reader(content)
    if reader is WebPImageFile:
        # Its reader asks for memory for the canvas as it opens, so the size comes first.
        _check_pixels(*_webp_canvas(content), limits)
    elif reader is JpegImageFile:
        _check_scans(content)
    try:
        source = _CountedReads(content)
        image = reader(source)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # readers raise nearly every built-in error on damaged bytes
        raise _broken(error) from error
    _check_pixels(image.height, image.width, limits)
    if getattr(image, "n_frames", 1) > 1:
        raise BadImage("animated", f"The picture is an animation of {image.n_frames} frames.")  # type: ignore[attr-defined]
    orientation = _orientation(image)
    source.left = HEADER_READS + len(content) // BYTES_A_READ  # for decoding
    size = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    return image, size, orientation


def _reader(content: bytes) -> type[ImageFile.ImageFile]:
    """Pillow's reader of one format, used without `Image.open`: that one only warns of sizes up to twice its own limit."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _Png
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return WebPImageFile
    raise BadImage("unknown_format", f"The picture begins with {content[:12]!r}: it is neither PNG nor JPEG nor WEBP.")


def _webp_canvas(content: bytes) -> tuple[int, int]:
    """Height and width from the first chunk: extended, lossy or lossless."""
    chunk, data = content[12:16], content[20:30]
    if chunk == b"VP8X" and len(data) == 10:
        return int.from_bytes(data[7:10], "little") + 1, int.from_bytes(data[4:7], "little") + 1
    if chunk == b"VP8 " and len(data) == 10:
        width, height = struct.unpack("<HH", data[6:10])
        return height & 0x3FFF, width & 0x3FFF
    if chunk == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    raise BadImage("broken", f"The WEBP file's first chunk is {chunk!r}, not that of a picture.")


def _check_scans(content: bytes) -> None:
    if content.count(SCAN) <= SCANS:
        return
    scans, position = 0, 2  # previews and what is appended, such as videos, hold more: walk the markers of the first picture
    for _ in range(MARKERS):
        match = MARKER.search(content, position)
        if not match or match[1] == b"\xd9":
            return
        scans += match[1] == SCAN[1:]
        if scans > SCANS:
            break
        length = 0 if match[1] in b"\x01\xd8" else int.from_bytes(content[match.end() : match.end() + 2], "big")
        position = match.end() + length
    raise BadImage("too_many_parts", f"The JPEG has more than {SCANS} scans or {MARKERS} markers.")


def _check_pixels(height: int, width: int, limits: DecodeLimits) -> None:
    if height * width > limits.pixels:
        raise BadImage("too_many_pixels", f"The picture has {height} x {width} pixels; {limits.pixels} in all are allowed.")


def _orientation(image: ImageFile.ImageFile) -> int:
    """1 to 8, 1 where nothing is said."""
    try:
        # PngImageFile.getexif would decode to look behind the pixels.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _broken(error: Exception) -> BadImage:
    return BadImage("broken", f"The picture cannot be decoded: {type(error).__name__}: {str(error)[:200]}.")
