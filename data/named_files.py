"""Pictures and time series that a source names by path: nothing outside the source's folder is ever read."""

import re
from pathlib import Path, PurePosixPath

from moexpand.base.errors import InputError
from moexpand.data.image_decode import DEFAULT_LIMITS, BadImage
from moexpand.data.parts import Unusable

_WORDS = {"image": "picture", "series": "series"}


def file_inside(folder: Path, name: str, kind: str = "image") -> Path:
    """The file that a relative path names, which lies in `folder` or below, also when all links are followed.

    Args:
        folder: of the source.
        name: the path.
        kind: image or series.

    Raises:
        Unusable: `image_outside`: it is absolute, an address or leads out of the folder; `image_missing`: there is no such file;
            `series_outside` and `series_missing` likewise.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or re.match(r"[a-z][a-z0-9+.-]*:", name, re.I):
        raise Unusable(f"{kind}_outside", f"the {_WORDS[kind]} {name[:200]!r} is not a path inside the folder of its file")
    path = folder / relative
    try:
        found = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have; links that go round in a circle
        found = False
    if not found:
        raise Unusable(f"{kind}_missing", f"there is no {_WORDS[kind]} {name[:200]!r}")
    return path


def picture_content(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        BadImage: it is larger than any picture may be.
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(DEFAULT_LIMITS.bytes + 1)
    except OSError as error:
        raise InputError(f"The source {path} cannot be read: {error.strerror}.") from None
    if len(content) > DEFAULT_LIMITS.bytes:
        raise BadImage("too_many_bytes", f"The picture {path} has more than {DEFAULT_LIMITS.bytes} bytes.")
    return content


def picture_ending(content: bytes) -> str:
    """Ending of a picture's name by its first bytes: png, jpg or webp.

    Raises:
        BadImage: it is none of them (`unknown_format`).
    """
    for start, ending in ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp")):
        if content.startswith(start):
            return ending
    raise BadImage("unknown_format", "The picture is neither PNG, JPEG nor WEBP.")
