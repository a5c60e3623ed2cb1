"""Measures of records: compared with other implementations and with slow ones written here."""

import base64
import io
import json
import math
import random
import zlib
from collections import Counter
from pathlib import Path

import imagehash
import numpy as np
import pypdfium2 as pdfium
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from moexpand.data import measures
from moexpand.data.measures import (
    agreement,
    exact_digest,
    ink,
    language_of,
    measure,
    minhash,
    ngram_repetition,
    phash,
    repetition,
    symbol_ratio,
    thumbnail,
    tokens,
)

MINHASH_CRC = 2808535291
WAVES_HASH = "800068d949b300996def09bb00932cdd7fbe493a2cdb77e65de009972ef67f24"
SAMPLES = Path(measures.__file__).parent / "samples"


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def plot(seed: int) -> Image.Image:
    """Axes, a curve and points, as a plotting program draws them."""
    numbers = random.Random(seed)
    picture = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 30, 610, 420), outline="black", width=2)
    heights = [numbers.randint(60, 400) for _ in range(8)]
    draw.line([(60 + 75 * i, height) for i, height in enumerate(heights)], fill="blue", width=4)
    for _ in range(40):
        x, y = numbers.randint(70, 600), numbers.randint(40, 410)
        draw.ellipse((x, y, x + 8, y + 8), fill="red")
    return picture


def hash_of(content: bytes) -> int:
    return int.from_bytes(phash(thumbnail(content)), "big")


def is_like_its_own_alone(hashes: list[int], others: list[int]) -> None:
    """Picture i and the changed picture j are within ten bits if and only if i = j."""
    distances = np.array([[(left ^ right).bit_count() for right in others] for left in hashes])
    assert np.array_equal(distances <= 10, np.eye(len(hashes), dtype=bool)), distances


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def edited_pairs(count: int):
    """Pairs of word lists with edits from none to many, and their exact Jaccard similarity."""
    numbers = random.Random(3)
    for number in range(count):
        words = [f"w{numbers.randrange(5000)}" for _ in range(400)]
        other = [word if numbers.random() > number / count / 3 else f"x{numbers.randrange(5000)}" for word in words]
        a, b = shingles(words), shingles(other)
        yield words, other, len(a & b) / len(a | b)


def test_minhash_estimates_the_exact_jaccard_similarity_within_binomial_bounds():
    scores = []
    for words, other, exact in edited_pairs(120):
        estimate = (minhash(words) == minhash(other)).mean()
        error = math.sqrt(exact * (1 - exact) / 128)
        if error == 0:
            assert estimate == exact
        else:
            scores.append((estimate - exact) / error)
    assert len(scores) > 100
    assert max(map(abs, scores)) < 4.5  # of about 110 draws one passes 4.5 sigma with a chance below 0.1 %
    assert abs(np.mean(scores)) < 4 / math.sqrt(len(scores))  # no bias
    assert 0.7 < np.std(scores) < 1.3  # and the spread of independent values


def test_case_punctuation_and_white_space_leave_the_minhash_as_it_is():
    text = (
        "The Melting-Point rises with pressure, as Figure 3 shows; the alloy of iron and nickel is stable up to 40 GPa at least. "
        * 2
    )
    assert np.array_equal(minhash(tokens(text)), minhash(tokens(text.upper().replace(" ", "\n  ").replace(",", " -"))))


def test_texts_without_spaces_are_compared_by_runs_of_characters():
    numbers = random.Random(5)
    text = [chr(numbers.randrange(0x4E00, 0x6000)) for _ in range(600)]
    other = [*text[:300], "水", "火", *text[300:]]
    exact = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
    assert 0.95 < exact < 1
    estimate = (minhash(tokens("".join(text))) == minhash(tokens("".join(other)))).mean()
    assert abs(estimate - exact) < 4.5 * math.sqrt(exact * (1 - exact) / 128)
    assert tokens("图3 shows ภาษา") == ["图", "3", "shows", "ภ", "า", "ษ", "า"]


def test_signatures_stay_the_same_from_version_to_version():
    words = [f"word{i}" for i in range(100)]
    assert minhash(words).dtype == np.uint32
    assert zlib.crc32(minhash(words).astype("<u4").tobytes()) == MINHASH_CRC
    waves = (np.multiply.outer(np.arange(64), np.arange(64)) * 7 % 251).astype(np.uint8)
    assert phash(waves).hex() == WAVES_HASH


def test_short_texts_have_no_minhash():
    assert minhash(["a"] * 19) is None
    assert minhash(["a"] * 20) is not None


@pytest.mark.parametrize("seed", range(5))
def test_phash_is_the_one_of_imagehash(seed):
    grey = thumbnail(file_of(plot(seed)))
    theirs = imagehash.phash(Image.fromarray(grey), hash_size=16).hash.ravel()
    ours = np.unpackbits(np.frombuffer(phash(grey), np.uint8)).astype(bool)
    assert (ours != theirs).sum() <= 2  # bits at the median itself


def scaled(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def with_dust(picture: Image.Image) -> Image.Image:
    ImageDraw.Draw(picture).point([(2, 2), (picture.width - 3, picture.height - 3)], fill="black")
    return picture


CHANGES = {
    "jpeg": lambda picture: file_of(picture, "JPEG", quality=60),
    "webp": lambda picture: file_of(picture, "WEBP", quality=60),
    "smaller": lambda picture: file_of(scaled(picture, 448, 336)),
    "margins": lambda picture: file_of(ImageOps.expand(picture, (3, 12, 25, 0), "white")),
    "dust": lambda picture: file_of(with_dust(ImageOps.expand(picture, 20, "white"))),
    "grey": lambda picture: file_of(picture.convert("L")),
    "all": lambda picture: file_of(scaled(ImageOps.expand(picture, 7, "white"), 500, 400), "JPEG", quality=60),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_plot_saved_otherwise_is_within_ten_bits_and_other_plots_are_not(change):
    plots = [plot(seed) for seed in range(6)]
    is_like_its_own_alone(
        [hash_of(file_of(picture)) for picture in plots], [hash_of(CHANGES[change](picture)) for picture in plots]
    )


def test_real_pages_of_one_style_are_told_apart_at_another_resolution():
    document = pdfium.PdfDocument(SAMPLES / "hcl-colors.pdf")
    fine, coarse = (
        [hash_of(file_of(page.render(scale=dpi / 72).to_pil(), compress_level=1)) for page in document] for dpi in (144, 120)
    )
    assert len(fine) >= 10
    is_like_its_own_alone(fine, coarse)


def test_blank_pictures_have_no_hash_and_say_how_blank_they_are(tmp_path):
    Image.new("RGB", (300, 200), "white").save(tmp_path / "white.png")
    halves = Image.new("L", (64, 64), 0)
    halves.paste(255, (32, 0, 64, 64))
    assert ink(np.asarray(halves)) == 127.5
    plot(1).save(tmp_path / "plot.png")
    found = measure({"text": "Figure 1", "images": ["white.png", "plot.png"]}, tmp_path)
    assert found["phash"][0] is None
    assert len(bytes.fromhex(found["phash"][1])) == 32
    assert found["ink"][0] == 0.0
    assert found["ink"][1] > 10


def test_a_transparent_background_counts_as_white():
    opaque = plot(2)
    clear = opaque.convert("RGBA")
    clear.putdata([(0, 0, 0, 0) if pixel == (255, 255, 255) else (*pixel, 255) for pixel in opaque.get_flattened_data()])
    assert np.array_equal(thumbnail(file_of(clear)), thumbnail(file_of(opaque)))


def test_images_that_must_not_be_read_are_counted_and_do_not_stop_the_build(tmp_path):
    good = file_of(plot(1))
    # A valid header of 100,000 x 100,000 pixels: 10 billion are claimed by 57 bytes.
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = good[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + good[33:60]
    files = {"bomb.png": bomb, "cut.png": good[: len(good) // 2], "other.png": file_of(plot(1), "GIF"), "good.png": good}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = measure({"text": "Four images.", "images": list(files)}, tmp_path)
    assert found["refused_images"] == ["too_many_pixels", "broken", "unknown_format"]
    assert [level is None for level in found["ink"]] == [True, True, True, False]
    assert [value is None for value in found["phash"]] == [True, True, True, False]


def test_equal_records_have_equal_digests_and_others_do_not():
    base = exact_digest("a text", None, [b"image"])
    assert exact_digest(" a\n\n text ", None, [b"image"]) == base
    others = [
        exact_digest("atext", None, [b"image"]),
        exact_digest("a text", None, [b"imagf"]),
        exact_digest("a text", None, []),
        exact_digest("a text", None, [b"ima", b"ge"]),
        exact_digest("a text", [], [b"image"]),
        exact_digest("a text", [{"text": "a text", "loss": False}], [b"image"]),
        exact_digest("a text", [{"text": "a text"}], [b"image"]),
    ]
    assert len({base, *others}) == 8


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The melting point of the alloy rises with pressure, as the phase diagram shows for three compositions."),
        ("de", "Der Schmelzpunkt der Legierung steigt mit dem Druck, wie das Phasendiagramm in der Abbildung zeigt."),
        ("fr", "Le point de fusion de l'alliage augmente avec la pression, comme le montre le diagramme de phase."),
        ("zh", "合金的熔点随压力升高而升高，如下图中的相图所示，三种成分的结果相近。"),
        ("ja", "合金の融点は圧力とともに上昇し、下の図の相図に示すとおりである。"),
        ("ru", "Температура плавления сплава повышается с давлением, как показывает фазовая диаграмма."),
    ],
)
def test_languages_are_recognised_with_their_probability(language, text):
    found, probability = language_of(text)
    assert found == language
    assert 0.9 < probability <= 1.0


def test_what_is_no_language_is_unsure_and_what_is_short_is_not_judged():
    assert language_of("12.5 17.25 3.0 " * 30) == (None, None)
    assert language_of("Figure 3: PCA plot") == (None, None)
    assert language_of("for i in range(10): x[i] = f(y[i]) + 3 * z[i]; print(x, y)\n" * 5)[1] < 0.5


@given(st.lists(st.sampled_from(["a", "bb", "c", "dddd"]), max_size=40))
def test_ngram_repetition_marks_the_characters_of_runs_that_occurred_before(words):
    marked = [False] * len(words)
    for start in range(len(words) - 4):
        if any(words[before : before + 5] == words[start : start + 5] for before in range(start)):
            marked[start : start + 5] = [True] * 5
    total = sum(map(len, words))
    expected = sum(len(word) for word, mark in zip(words, marked, strict=True) if mark) / total if total else 0.0
    assert ngram_repetition(words) == pytest.approx(expected)


def test_symbols_and_repeated_lines_are_fractions_of_the_characters():
    assert symbol_ratio("ab 12") == pytest.approx(0.4)
    assert symbol_ratio("图 ab") == 0.0
    assert repetition("same\nsame\nother\n") == pytest.approx(4 / 13)
    assert repetition("") == symbol_ratio("") == 0.0


@pytest.mark.parametrize(
    ("caption", "inner", "expected"),
    [
        ("Figure 3: Time against ranks, n = 1000", "time (s) ranks 0 500 1000", 0.75),  # "against" is not in the figure
        ("Figure 3: Time against ranks", "3 figure", 0.0),  # the label does not count
        ("Figure showing TIME", "time", 0.3333),
        ("Fig. S2", "time", None),
        ("Figure 1: of a", "time", None),
        ("Figure 1: Time", " \n", None),
    ],
)
def test_agreement_is_the_share_of_a_captions_numbers_and_words_in_the_figure(caption, inner, expected):
    assert agreement(caption, inner) == expected


def test_measures_are_json_and_the_same_every_time(tmp_path):
    plot(4).save(tmp_path / "0.png")
    text = "Figure 1: A curve.\n\n" + "Figure 1 shows a curve and forty points, and some words follow that are not repeated. " * 2
    record = {"kind": "figure", "text": text, "images": ["0.png"], "caption": "Figure 1: A curve.", "inner_text": "curve 0 10"}
    found = measure(record, tmp_path)
    assert json.loads(json.dumps(found)) == found == measure(record, tmp_path)
    assert found["characters"] == len(text)
    assert found["visible"] == sum(count for character, count in Counter(text).items() if not character.isspace())
    assert found["agreement"] == 1.0
    assert found["language"] == "en"
    signature = np.frombuffer(base64.b64decode(found["minhash"]), "<u4")
    assert np.array_equal(signature, minhash(tokens(text)))


@given(st.text(max_size=200))
def test_any_text_can_be_measured(text):
    found = measure({"text": text}, Path())
    assert all(0 <= found[name] <= 1 for name in ("symbol_ratio", "repetition", "ngram_repetition"))
    assert (found["visible"] == 0) == (not text.strip())
