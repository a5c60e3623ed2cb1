"""Bytes become the pixels that transformers sees, and hostile files are refused, counted, quick and small."""

import io
import itertools
import pickle
import resource
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from moexpand.base.errors import InputError
from moexpand.data.image_decode import REASONS, BadImage, DecodeLimits, decode_image, image_size
from tests.data.picture_maker import chunk, picture, png, saved


def reason(content: bytes, limits: DecodeLimits | None = None) -> str:
    """Why a file is refused; warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage) as caught:
            decode_image(content, limits or DecodeLimits())
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *itertools.product(["RGB", "RGBA", "L", "LA", "P", "P+transparency", "1", "I;16"], ["PNG"]),
        *itertools.product(["RGB", "L", "CMYK", "YCbCr"], ["JPEG"]),
        *itertools.product(["RGB", "RGBA"], ["WEBP"]),
    ],
)
def test_decoded_pixels_are_those_of_transformers_conversion(mode, format):
    content = saved(picture(61, 45, mode), format)
    decoded = decode_image(content)
    assert (decoded.mode, decoded.size) == ("RGB", (61, 45))
    assert image_size(content) == (45, 61)
    assert np.array_equal(np.asarray(decoded), convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True))


def test_16_bit_and_transparent_rgb_png_are_converted_as_transformers_does():
    colour = png(40, 30, bits=16, colour=2, before=chunk(b"tRNS", b"\0" * 6))
    for content in (colour, png(40, 30, bits=16, colour=6), png(40, 30, before=chunk(b"tRNS", b"\0\0"))):
        expected = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
        assert expected.min() == 255, "black is the transparent colour: the background shows"
        assert np.array_equal(np.asarray(decode_image(content)), expected)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_upright_in_size_and_pixels_as_transformers_loads_them(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture(50, 20), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    decoded = decode_image(content)
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    assert image_size(content) == (decoded.height, decoded.width)


def test_an_orientation_behind_the_pixels_or_damaged_leaves_size_and_pixels_as_they_stand():
    exif = Image.Exif()
    exif[0x0112] = 6
    behind = png(50, 20, after=chunk(b"eXIf", exif.tobytes()[6:]))
    damaged = saved(picture(50, 20), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 30)
    for content in (behind, damaged):
        assert image_size(content) == (20, 50)
        assert decode_image(content).size == (50, 20)


def test_a_jpeg_with_a_second_picture_is_its_first_and_an_animation_is_refused():
    first, second = picture(40, 30), picture(40, 30, seed=1)
    content = saved(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    for format in ("PNG", "WEBP"):
        animation = saved(first, format, save_all=True, append_images=[second])
        assert reason(animation) == "animated"
        with pytest.raises(BadImage, match="2 frames"):
            image_size(animation)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "ICO", "BMP", "PPM", "EPS", "PDF", "JPEG2000", "DDS", "SGI", "TGA", "ICNS"])
def test_every_other_format_is_refused_whatever_its_name_says(format):
    content = saved(picture(64, 64), format)
    assert reason(content) == "unknown_format"
    with pytest.raises(BadImage) as caught:
        image_size(content)
    assert caught.value.reason == "unknown_format"


class _Trap:
    def __reduce__(self):
        return (sys.exit, ("a pickle was loaded",))


def test_pickles_arrays_markup_archives_and_nothing_are_refused_unread():
    array, objects = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros((8, 8, 3), np.uint8))
    np.save(objects, np.array([_Trap()], object), allow_pickle=True)
    files = [pickle.dumps(_Trap()), array.getvalue(), objects.getvalue(), b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
    files += [b"", b"\x89PNG", b"\xff\xd8", b"RIFF\0\0\0\0WAVE", b"PK\x03\x04", b"%!PS-Adobe\n(x) run", b"pipe:cat /etc/passwd"]
    for content in files:
        assert reason(content) == "unknown_format", content[:20]


def test_bad_image_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("broken", "A sentence.")))
    assert (error.reason, str(error)) == ("broken", "A sentence.")


def within(seconds: float, mebibytes: int, content: bytes, limits: DecodeLimits | None = None) -> str:
    """The reason, found in little time and memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = reason(content, limits)
    assert time.process_time() - began < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < mebibytes
    return found


def webp(width: int, height: int, chunk_name: bytes) -> bytes:
    """A WEBP header that claims a size."""
    data = {
        b"VP8X": b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
        b"VP8L": b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + b"\0" * 5,
    }[chunk_name]
    body = b"WEBP" + chunk_name + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("name", ["png", "png warned about", "png of 2^31", "VP8X", "VP8 ", "VP8L", "jpeg"])
def test_a_picture_of_too_many_pixels_is_refused_before_memory_is_asked_for(name):
    if name == "png":
        content = png(20_000, 20_000, bits=1)
        assert len(content) < 60_000
    elif name == "png warned about":
        content = png(10_000, 10_000, bits=1)  # Pillow opens it with a warning
    elif name == "png of 2^31":
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0))
        content += chunk(b"IDAT", b"")
    elif name == "jpeg":
        content = saved(picture(64, 64), "JPEG")
        at = content.index(b"\xff\xc0") + 5
        content = content[:at] + struct.pack(">HH", 65_500, 65_500) + content[at + 4 :]
    else:
        content = webp(16_383, 16_383, name.encode())
    assert within(1, 30, content) == "too_many_pixels"
    with pytest.raises(BadImage, match="pixels"):
        image_size(content)


def test_limits_are_exact_and_must_be_positive():
    content = png(100, 50)
    assert decode_image(content, DecodeLimits(pixels=5000, bytes=len(content))).size == (100, 50)
    assert reason(content, DecodeLimits(pixels=4999)) == "too_many_pixels"
    assert reason(content, DecodeLimits(bytes=len(content) - 1)) == "too_many_bytes"
    with pytest.raises(InputError, match="at least 1"):
        DecodeLimits(pixels=0)


def progressive_jpeg(side: int, scans: int) -> bytes:
    """Grey, of many scans that each take a few bytes and a walk over all blocks."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    one_code = bytes([1] + [0] * 15)
    tables = (
        segment(0xDB, b"\0" + b"\1" * 64)
        + segment(0xC4, b"\x00" + one_code + b"\x00")
        + segment(0xC4, b"\x10" + one_code + b"\xe0")
    )
    blocks = (side // 8) ** 2
    bits = ("0" + "1" * 14) * (blocks // 32767 + 1)  # "end of band" for 32,767 blocks
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    first = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + b"\0" * (blocks // 8 + 1)
    return b"\xff\xd8" + tables + frame + first + (segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + data) * (scans - 1) + b"\xff\xd9"


def test_files_of_countless_parts_are_refused_quickly():
    many = 1_000_000
    header = b"\xff\xd8"
    whole = png(64, 64)
    at = whole.index(b"IDAT") - 4
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * (1 << 20)))
    assert within(2, 100, png(64, 64, before=chunk(b"abCd", b"") * many)) == "too_many_parts"
    assert within(2, 100, whole[:at] + chunk(b"IDAT", b"") * many + whole[at:]) == "too_many_parts"
    assert within(5, 100, png(64, 64, before=profile * 20_000)) == "too_many_parts"
    for content in (header + b"\xff\xe5\0\x02" * many, header + b"\xff" * many, header + b"\xff\xe0\0\x02" + b"a" * many):
        assert within(2, 100, content) == "too_many_parts"
    assert within(2, 100, progressive_jpeg(2048, 5000)) == "too_many_parts"
    assert within(2, 100, header + b"\xff\xda\0\x02\xff\x01\xff\x01" * many) == "too_many_parts"
    behind = png(64, 64, after=chunk(b"abCd", b"") * many + profile * 1000)
    began = time.process_time()
    assert decode_image(behind).size == (64, 64)
    assert time.process_time() - began < 1


def test_honest_files_of_many_parts_are_decoded():
    assert decode_image(progressive_jpeg(256, 100)).size == (256, 256)
    assert reason(progressive_jpeg(256, 101)) == "too_many_parts"
    video = np.random.default_rng(0).bytes(1 << 20) + b"\xff\xda" * 200
    assert decode_image(saved(picture(80, 60), "JPEG", progressive=True) + video).size == (80, 60)
    large = saved(picture(1500, 1500), "PNG")
    pixels, at = large[large.index(b"IDAT") + 4 : large.rindex(b"IEND") - 8], large.index(b"IDAT") - 4
    if pixels.count(b"IDAT"):  # Pillow writes chunks of 64 KiB: take their contents
        pixels = b"".join(_chunks(large, b"IDAT"))
    small_chunks = b"".join(chunk(b"IDAT", pixels[start : start + 4096]) for start in range(0, len(pixels), 4096))
    content = large[:at] + small_chunks + chunk(b"IEND", b"")
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(decode_image(large)))


def _chunks(content: bytes, name: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == name:
            found.append(content[at + 8 : at + 8 + length])
        at += length + 12
    return found


FILES = {
    "PNG": saved(picture(90, 70), "PNG"),
    "PNG of a palette": saved(picture(90, 70, "P+transparency"), "PNG"),
    "JPEG": saved(picture(90, 70), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "JPEG progressive": saved(picture(90, 70), "JPEG", progressive=True),
    "WEBP": saved(picture(90, 70), "WEBP"),
    "WEBP lossless": saved(picture(90, 70, "RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_before_its_last_bytes_is_refused(name):
    content = FILES[name]
    for length in [*range(12, 200), *range(200, len(content) - 20, len(content) // 60)]:
        assert reason(content[:length]) == "broken", length


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), min_size=1, max_size=8),
    near=st.booleans(),
)
def test_damaged_files_give_a_picture_of_the_size_in_the_header_or_a_reason(name, changes, near):
    content = bytearray(FILES[name])
    for place, value in changes:
        at = int(place * (64 if near else len(content)))
        content[at : at + len(value)] = value
    try:
        decoded = decode_image(bytes(content), DecodeLimits(pixels=1_000_000))
    except BadImage as error:
        assert error.reason in REASONS
        assert str(error)
        return
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).dtype == np.uint8
    assert image_size(bytes(content)) == np.asarray(decoded).shape[:2]
