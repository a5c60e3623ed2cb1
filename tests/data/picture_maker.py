"""Pictures for tests: noise in any mode, their files, and PNG files made by hand."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that every value occurs and resampling overshoots."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    noise[height // 2 :] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    image = Image.fromarray(noise, "RGBA")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), dtype=np.uint16))
    if mode == "P+transparency":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = bytes(range(0, 256, 2))
        return image
    return image.convert("RGBA").convert(mode) if mode not in ("CMYK", "YCbCr", "1", "PA") else _through_rgb(image, mode)


def _through_rgb(image: Image.Image, mode: str) -> Image.Image:
    return image.convert("P").convert("PA") if mode == "PA" else image.convert("RGB").convert(mode)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int = 8, colour: int = 0, before: bytes = b"", after: bytes = b"") -> bytes:
    """A black PNG, compressed without holding its pixels; chunks can stand before and after the pixels."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    compress = zlib.compressobj(9)
    row = b"\0" * (1 + (width * channels * bits + 7) // 8)
    data = b"".join(compress.compress(row) for _ in range(height)) + compress.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), before, chunk(b"IDAT", data), after, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
