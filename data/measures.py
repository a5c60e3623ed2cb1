"""What the filters look at: numbers and signatures of one record, taken once.

`measure` reads a record's text and pictures and returns a small JSON object; filters.py and near_duplicates.py decide from it
alone, so that another threshold costs a pass over measures and not over sources. MinHash and the transform of pHash are integer
arithmetic, and fractions are rounded, so that no processor's rounding shows.
"""

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moexpand.base.random import generator, raw_integers
from moexpand.data.image_decode import DEFAULT_LIMITS, BadImage, decode_image
from moexpand.data.order import mix64

SHINGLE = 5
"""Tokens in a row that MinHash compares and that count as a repeated n-gram."""
PERMUTATIONS = 128
"""Of a MinHash signature; the standard error of an estimated Jaccard similarity J is sqrt(J (1 - J) / 128), at most 0.044."""
MIN_TOKENS = 20
"""Shorter texts have no MinHash: a handful of shingles says little."""
HASH_SIDE = 16
"""A pHash has HASH_SIDE squared bits (256): 64 bits put unlike plots of one style together."""
HASH_PIXELS = 4 * HASH_SIDE
"""Side of the grey thumbnail that the pHash is computed of."""
TRIMMED = 0.002
"""Part of a picture's darkness that may lie outside of each border of its thumbnail."""
PAPER = 32
"""Grey levels below white that still count as paper, as JPEG leaves them around letters."""
MIN_INK = 2.0
"""Standard deviation of a thumbnail's grey levels below which a picture is nearly blank and its pHash would be noise."""
MIN_LETTERS = 20
"""Texts with fewer letters have no language."""
LANGUAGE_CHARACTERS = 3_000
"""How much of a text decides its language."""
# Scripts written without spaces: Han, kana, Thai, Lao, Tibetan, Myanmar, Khmer. Each of their characters is a token.
_UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED += "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LABEL = re.compile(r"^\W*(?i:fig(?:ure)?|tab(?:le)?|scheme|chart)s?\.?\s*(?:[A-Z]?\d+|[A-Z])(?:\.\d+)*[a-z]?\b\W*")
_NUMBER_OR_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")


def measure(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure one record.

    Args:
        record: `text`, optional `parts`, `images` and `series` (file names relative to `folder`), `caption` and `inner_text`.
        folder: where the files lie.

    Returns:
        A JSON object, equal for equal input:

        - `characters`, `visible`: of the text, and how many of them are not white space.
        - `symbol_ratio`, `repetition`, `ngram_repetition`: fractions from 0 to 1, see the functions of these names.
        - `language`, `language_probability`: ISO 639 code and its probability from 0 to 1; null below `MIN_LETTERS` letters.
        - `exact`: 32 hexadecimal digits, equal for records with the same text (white space aside), parts, images and series.
        - `minhash`: base64 of little-endian uint32 [PERMUTATIONS], or null for fewer than `MIN_TOKENS` tokens.
        - `phash`: for every image 64 hexadecimal digits, or null where it is nearly blank or cannot be read.
        - `ink`: for every image the standard deviation of its grey levels (0 to 127.5); null where it cannot be read.
        - `refused_images`: the reason of `image_decode.BadImage` for every image that cannot or must not be read.
        - `agreement`: see the function; null where there is nothing to compare.

    Raises:
        OSError: a file is missing or cannot be read from the disk.
    """
    text = record["text"]
    files = [_read(Path(folder) / name) for name in record.get("images", [])]
    refused, inks, hashes = _measure_images(files)
    series = [(Path(folder) / name).read_bytes() for name in record.get("series", [])]
    words = tokens(text)
    language, probability = language_of(text)
    signature = minhash(words)
    return {
        "characters": len(text),
        "visible": sum(map(len, text.split())),
        "symbol_ratio": round(symbol_ratio(text), 4),
        "repetition": round(repetition(text), 4),
        "ngram_repetition": round(ngram_repetition(words), 4),
        "language": language,
        "language_probability": probability,
        "exact": exact_digest(text, record.get("parts"), files + series),
        "minhash": None if signature is None else base64.b64encode(signature.astype("<u4").tobytes()).decode(),
        "phash": hashes,
        "ink": inks,
        "refused_images": refused,
        "agreement": agreement(record.get("caption") or text, record.get("inner_text") or ""),
    }


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(DEFAULT_LIMITS.bytes + 1)  # one byte too many is refused as well as any number


def _measure_images(files: list[bytes]) -> tuple[list[str], list[float | None], list[str | None]]:
    refused: list[str] = []
    inks: list[float | None] = []
    hashes: list[str | None] = []
    for content in files:
        try:
            grey = thumbnail(content)
        except BadImage as error:
            refused.append(error.reason)
            inks.append(None)
            hashes.append(None)
        else:
            inks.append(ink(grey))
            hashes.append(phash(grey).hex() if ink(grey) >= MIN_INK else None)
    return refused, inks, hashes


def symbol_ratio(text: str) -> float:
    """Fraction of the characters that are neither letters nor white space (digits, punctuation, control characters)."""
    plain = sum(character.isalpha() or character.isspace() for character in text)
    return (len(text) - plain) / max(len(text), 1)


def repetition(text: str) -> float:
    """Fraction of the characters that stand in a line which occurred before; white space at the ends does not count."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    total = sum(map(len, lines))
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return repeated / max(total, 1)


def tokens(text: str) -> list[str]:
    """Words without case and punctuation; every character of a script without spaces (Chinese, Japanese, Thai, ...) is one."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def ngram_repetition(words: list[str]) -> float:
    """Fraction of the tokens' characters that lie in a run of `SHINGLE` tokens which occurred before.

    This is the rule for duplicate 5-grams of Gopher (Rae et al. 2021, table A1): characters in several such runs count once.
    """
    seen: set[tuple[str, ...]] = set()
    repeated = 0
    counted_to = 0
    for start in range(len(words) - SHINGLE + 1):
        run = tuple(words[start : start + SHINGLE])
        if run in seen:
            repeated += sum(map(len, words[max(start, counted_to) : start + SHINGLE]))
            counted_to = start + SHINGLE
        seen.add(run)
    return repeated / max(sum(map(len, words)), 1)


def language_of(text: str) -> tuple[str | None, float | None]:
    """ISO 639 code of the most likely language and its probability, over all languages that py3langid knows."""
    text = text[:LANGUAGE_CHARACTERS]
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return None, None
    language, probability = _language_model()(text)
    return language, round(probability, 3)


@cache
def _language_model() -> Callable[[str], tuple[str, float]]:
    # Reading the model takes a second; a build without texts need not wait for it.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    return classify


def exact_digest(text: str, parts: list[dict[str, Any]] | None, files: list[bytes]) -> str:
    """BLAKE2b-128 of a text without regard to the amount of white space, of its parts and of its images and series."""
    digest = hashlib.blake2b(digest_size=16)
    fields = [
        " ".join(text.split()).encode(errors="surrogatepass"),
        b"" if parts is None else json.dumps(parts, sort_keys=True).encode(),
    ]
    for field in fields + files:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.hexdigest()


def minhash(words: list[str]) -> np.ndarray | None:
    """MinHash signature of the set of runs of `SHINGLE` tokens (Broder 1997), uint32 [PERMUTATIONS]; None for a short text.

    Two signatures agree at each place with the probability of the two sets' Jaccard similarity. Place p holds the least of the
    shingles' hashes under a mixing of 64 bits that is keyed by p.
    """
    if len(words) < MIN_TOKENS:
        return None
    table = {word: _hash64(word) for word in set(words)}
    each = np.fromiter((table[word] for word in words), np.uint64, len(words))
    runs = np.zeros(len(words) - SHINGLE + 1, np.uint64)
    for k in range(SHINGLE):
        runs = mix64(runs + each[k : k + len(runs)])
    runs = np.unique(runs)
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint64)
    for start in range(0, len(runs), 4096):
        mixed = mix64(runs[start : start + 4096, None] ^ _seeds()) >> np.uint64(32)
        least = np.minimum(least, mixed.min(axis=0))
    return least.astype(np.uint32)


def _hash64(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


@cache
def _seeds() -> np.ndarray:
    return raw_integers(generator(0, "minhash"), PERMUTATIONS)


def thumbnail(content: bytes) -> np.ndarray:
    """Grey levels of a picture without its white margins, uint8 [HASH_PIXELS, HASH_PIXELS].

    Raises:
        BadImage: see `image_decode.decode_image`.
    """
    grey = decode_image(content).convert("L")
    return np.asarray(grey.resize((HASH_PIXELS, HASH_PIXELS), Image.Resampling.LANCZOS, box=_drawn(np.asarray(grey))))


def _drawn(grey: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in fractions of a pixel, of what is drawn on white paper.

    Margins depend on who cropped a picture, and three pixels more of them move a dozen bits of its hash. A border has `TRIMMED`
    of the darkness on its outer side: unlike the outermost dark pixel this place hardly moves with noise and resolution.
    """
    dark = 255 - grey.astype(np.int64)
    dark[dark < PAPER] = 0
    borders = []
    for axis in (0, 1):
        sums = np.concatenate([[0], np.cumsum(dark.sum(axis=axis))])
        places = np.arange(len(sums))
        first = np.interp(TRIMMED * sums[-1], sums, places)
        last = places[-1] - np.interp(TRIMMED * sums[-1], (sums[-1] - sums)[::-1], places)
        borders.append((float(first), float(last)) if last - first >= 1.0 else (0.0, float(places[-1])))
    (left, right), (top, bottom) = borders
    return left, top, right, bottom


def ink(grey: np.ndarray) -> float:
    """Standard deviation of grey levels: 0 for a blank picture, 127.5 for one that is half black and half white."""
    return round(float(grey.std(dtype=np.float64)), 2)


def agreement(caption: str, inner_text: str) -> float | None:
    """Share of a caption's distinct numbers and words that also stand in the figure, from its text layer.

    Numbers ("0.5", "2011") and words of four letters and more count, without case; the label ("Figure 3:") does not. None without
    a text layer or without such words. A low share is weak evidence: many right captions name nothing that is in their figure.
    """
    if not inner_text.strip():
        return None
    named = {term for term in _terms(_LABEL.sub("", caption)) if term[0].isdigit() or len(term) >= 4}
    return round(len(named & set(_terms(inner_text))) / len(named), 4) if named else None


def _terms(text: str) -> list[str]:
    return _NUMBER_OR_WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def phash(grey: np.ndarray) -> bytes:
    """Perceptual hash of a thumbnail [HASH_PIXELS, HASH_PIXELS]: 256 bits, rows first, the first bit of a byte the highest.

    A bit says whether one of the 16 x 16 lowest frequencies of the cosine transform lies above their median, as the `phash` of
    imagehash does; here in integers, so that no processor's rounding decides a bit.
    """
    frequencies = _cosines() @ grey.astype(np.int64) @ _cosines().T
    return np.packbits(frequencies > np.median(frequencies)).tobytes()


@cache
def _cosines() -> np.ndarray:
    """Lowest rows of the type-II cosine transform, times 2**16, int64 [HASH_SIDE, HASH_PIXELS]: sums stay below 2**53."""
    rows = [
        [round(math.cos(math.pi * k * (2 * n + 1) / (2 * HASH_PIXELS)) * 2**16) for n in range(HASH_PIXELS)]
        for k in range(HASH_SIDE)
    ]
    return np.array(rows, np.int64)
