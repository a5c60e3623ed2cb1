"""Rows bring time series before their text; what cannot be used is counted and the first one named; all can be looked at."""

import csv

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from moexpand.base.errors import InputError
from moexpand.data.dataset import Corpus
from moexpand.data.inspect import inspect_shards
from moexpand.data.sheet import write_sheet
from tests.data.series_maker import build, heard, hole, jsonl, noise, npy, standardised
from tests.data.test_multimodal import words


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_row_brings_its_series_before_its_text(tmp_path, tokenizer_folder, form):
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    values = [noise(i, *shape) for i, shape in enumerate([(50,), (300, 3), (7, 1)])]
    for number, array in enumerate(values):
        (folder / "deep" / f"{number}.npy").write_bytes(npy(array))
    rows = [{"series": f"deep/{i}.npy", "sampling_rate": rate, "text": f"Row {i}."} for i, rate in enumerate((None, 100.5, 2500))]
    if form == "jsonl":
        jsonl(folder / "a.jsonl", *rows)
    elif form == "csv":
        with open(folder / "a.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["series", "sampling_rate", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    summary = build(folder, tmp_path / "out", tokenizer_folder)
    assert (summary["kinds"], summary["series"], summary["shards"][0]["series"]) == ({"series": 3}, 3, 3)
    found = {text: (rates, series) for text, rates, series in heard(tmp_path / "out")}
    assert {text: rates for text, (rates, _) in found.items()} == {"Row 0.": [12.5], "Row 1.": [100.5], "Row 2.": [2500.0]}
    for number, array in enumerate(values):
        np.testing.assert_allclose(found[f"Row {number}."][1][0], standardised(array), rtol=1e-6, atol=1e-6)
    corpus = Corpus(tmp_path / "out")
    assert corpus.series_points.tolist() == [50, 300, 7]
    assert corpus.series_rate.tolist() == [12.5, 100.5, 2500.0]
    assert corpus.content(1).parts == [{"series": "npy", "rate": 100.5}, {"text": "Row 1."}]


def test_several_series_of_a_row_have_one_rate_or_one_each(tmp_path, tokenizer_folder):
    for number in range(3):
        (tmp_path / f"{number}.npy").write_bytes(npy(noise(number, 40 + number)))
    names = [f"{number}.npy" for number in range(3)]
    source = jsonl(
        tmp_path / "a.jsonl",
        {"series": names, "sampling_rate": 50, "text": "One for all."},
        {"series": names[::-1], "sampling_rate": [1, None, 3.5], "text": "One each."},
        {"series": names, "sampling_rate": [1, 2], "text": "Too few."},
        {"series": "Springer Series in Statistics", "text": words(1, 60)},
        {"series": None, "sampling_rate": None, "text": words(2, 60)},
    )
    summary = build(source, tmp_path / "out", tokenizer_folder)
    assert summary["kinds"] == {"series": 2, "text": 2}
    assert summary["stages"]["documents"]["dropped"] == {"series_rate": 1}
    found = {text: (rates, [len(array) for array in series]) for text, rates, series in heard(tmp_path / "out")}
    assert found["One for all."] == ([50.0] * 3, [40, 41, 42])
    assert found["One each."] == ([1.0, 41 / 4, 3.5], [42, 41, 40])


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        ({"series": "gone.npy"}, "series_missing", "line 1: there is no series 'gone.npy'."),
        ({"series": "../good.npy"}, "series_name", "line 1: series 0 must be a file below the row's, ending in npy."),
        ({"series": "link.npy"}, "series_missing", "line 1: there is no series 'link.npy'."),
        ({"series": "/etc/a.npy"}, "series_name", "line 1: series 0 must be a file below the row's"),
        ({"series": "https://host/a.npy"}, "series_remote", "line 1: series 0 is an address or is inline"),
        ({"series": ["good.npy", 3]}, "series_name", "line 1: series 1 names no file."),
        ({"series": "good.csv", "sampling_rate": 3}, "series_name", "line 1: series 0 must be a file below the row's"),
        ({"sampling_rate": 0}, "series_rate", "line 1: The series 'good.npy' has the sampling rate 0;"),
        ({"sampling_rate": "fast"}, "series_rate", "line 1: The series 'good.npy' has the sampling rate 'fast';"),
        ({"series": "hole.npy"}, "series_not_finite", "line 1: The series 'hole.npy' holds nan at point 17 of channel 2."),
        ({"series": "cut.npy"}, "series_broken", "line 1: The series 'cut.npy' announces 800 bytes of values"),
        ({"series": "text.npy"}, "series_not_npy", "line 1: The series 'text.npy' is no .npy file"),
        ({"text": " "}, "empty", "line 1: there is no text."),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_and_named(tmp_path, tokenizer_folder, changes, reason, sentence):
    (tmp_path / "rows").mkdir()
    for name, content in {
        "rows/good.npy": npy(noise(0, 100)), "good.npy": npy(noise(0, 100)), "rows/hole.npy": npy(hole()),
        "rows/cut.npy": npy(noise(0, 100))[:-8], "rows/text.npy": b"1, 2, 3",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "rows" / "link.npy").symlink_to(tmp_path / "good.npy")
    row = {"series": "good.npy", "text": "What is heard?"}
    source = jsonl(tmp_path / "rows" / "a.jsonl", row | changes, row | {"text": "Good."})
    said: list[str] = []
    summary = build(source, tmp_path / "out", tokenizer_folder, said.append)
    assert summary["stages"]["documents"]["dropped"] == {reason: 1}
    assert summary["samples"] == 1
    assert f"[1/1] a.jsonl: 1 of 2 documents; the first left out is {sentence}" in said[0]
    with pytest.raises(InputError, match=r"No sample is left of 1 files .* The first left out is a\.jsonl: line 1: ") as caught:
        build(jsonl(source, row | changes), tmp_path / "none", tokenizer_folder)
    assert sentence in str(caught.value)


def test_rows_with_equal_texts_and_unequal_series_are_no_duplicates(tmp_path, tokenizer_folder):
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / f"{name}.npy").write_bytes(npy(noise(seed, 64)))
    rows = [{"series": f"{name}.npy", "sampling_rate": 5, "text": "What is heard?"} for name in "abc"]
    summary = build(jsonl(tmp_path / "rows.jsonl", *rows, rows[0] | {"sampling_rate": 6}), tmp_path / "out", tokenizer_folder)
    assert summary["samples"] == 3
    assert summary["stages"]["samples"]["dropped"] == {"duplicate": 1}


@pytest.mark.parametrize("change", ["another", "gone", "none"])
def test_a_series_that_changed_in_between_is_read_anew(tmp_path, tokenizer_folder, change):
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.npy").write_bytes(npy(noise(number, 80)))
    source = jsonl(folder / "a.jsonl", *({"series": f"{i}.npy", "text": f"Series {i}."} for i in range(2)))

    def stop_when_read(line: str) -> None:
        if line.startswith("[1/1]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", tokenizer_folder, stop_when_read)
    if change == "gone":
        (folder / "0.npy").unlink()
    elif change == "another":
        (folder / "0.npy").write_bytes(npy(noise(9, 80)))
    said: list[str] = []
    build(source, tmp_path / "out", tokenizer_folder, said.append)
    assert said[0].startswith("going on") == (change == "none")
    build(source, tmp_path / "fresh", tokenizer_folder)
    for name in ("shard-000000.tar", "shard-000000.index.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_inspect_and_the_sheet_show_the_series(tmp_path, tokenizer_folder):
    for number in range(3):
        (tmp_path / f"{number}.npy").write_bytes(npy(noise(number, 10 ** (number + 1), 2)))
    Image.effect_noise((80, 60), 60).save(tmp_path / "p.png")
    rows = [{"series": f"{i}.npy", "sampling_rate": 10 * i + 1, "text": f"Series {i}."} for i in range(3)]
    shown = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What is this?"}]
    rows.append({"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "Noise."}]})
    build(jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "out", tokenizer_folder)
    found = inspect_shards(tmp_path / "out")
    assert found["series"] == 3
    assert found["series_points"] == {"shortest": 10, "median": 100, "longest": 1000}
    assert found["series_rates"] == {"lowest": 1.0, "highest": 21.0}
    assert write_sheet(str(tmp_path / "out"), tmp_path / "sheet.html", 10) == 4
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert (page.count("<svg "), page.count("<img ")) == (3, 1)
    assert "1000 points, 2 channels" in page


def test_a_set_without_series_says_so(corpus, tmp_path):
    found = inspect_shards(corpus)
    assert found["series"] == 0
    assert "series_points" not in found
    with pytest.raises(InputError, match="holds no picture and no time series"):
        write_sheet(str(corpus), tmp_path / "sheet.html", 3)


def test_a_picture_whose_pixels_are_damaged_is_named_although_its_header_is_whole(tmp_path, tokenizer_folder):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        Image.effect_noise((80, 60), 60).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"Noise in the picture {name}.")
    content = bytearray((folder / "b.png").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "b.png").write_bytes(content)
    said: list[str] = []
    summary = build(folder, tmp_path / "out", tokenizer_folder, said.append)
    assert summary["stages"]["samples"]["dropped"] == {"unreadable_image": 1}
    assert said[0] == "[1/1] photos: 2 of 2 documents; the first left out is b.png: a picture cannot be used (broken)."
