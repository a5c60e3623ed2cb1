"""Time series in tars: webdataset reads ours, others' are found, and the first that cannot be used is named."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.data.dataset import Corpus
from moexpand.data.tar_index import index_tars
from tests.data.series_maker import build, heard, hole, jsonl, noise, npy
from tests.data.test_tar_index import add, png


def index(folder: Path, tokenizer: Path, **options: object) -> dict:
    given = {"text_key": "caption", "workers": 1, "max_bad_fraction": 0.0, "say": lambda line: None} | options
    return index_tars(folder, str(tokenizer), **given)


def test_webdataset_reads_the_tars_written(tmp_path, tokenizer_folder):
    values = [noise(i, 30, 2) for i in range(2)]
    for number, array in enumerate(values):
        (tmp_path / f"{number}.npy").write_bytes(npy(array))
    build(jsonl(tmp_path / "a.jsonl", {"series": ["0.npy", "1.npy"], "text": "Two."}), tmp_path / "out", tokenizer_folder)
    (sample,) = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode()
    assert all(np.array_equal(sample[f"{number}.npy"], array) for number, array in enumerate(values))
    assert json.loads(json.dumps(sample["parts.json"])) == [{"series": "0.npy"}, {"series": "1.npy"}, {"text": "Two."}]


def test_series_in_tars_of_others_are_found_by_their_rate_or_their_parts(tmp_path, tokenizer_folder):
    folder = tmp_path / "tars"
    folder.mkdir()
    values = [noise(i, 40 + i) for i in range(12)]
    with webdataset.TarWriter(str(folder / "a.tar")) as sink:
        sink.write({"__key__": "rate", "npy": values[0], "txt": "One.", "json": {"sampling_rate": 100}})
        sink.write({"__key__": "unknown", "npy": values[1], "txt": "Unknown rate.", "json": {"sampling_rate": None}})
        sink.write({"__key__": "sound", "flac": b"fLaC", "txt": "A sound.", "json": {"sampling_rate": [16000]}})
        sink.write({"__key__": "left", "npy": values[2], "txt": "An embedding.", "json": {"model": "x"}})
        many = {f"{i}.npy": values[i] for i in range(12)}
        rates = [float(i + 1) for i in range(12)]
        sink.write({"__key__": "many", **many, "depth.npy": values[0], "json": {"caption": "Many.", "sampling_rate": rates}})
        parts = [{"text": "Before "}, {"series": "1.npy", "rate": 9}, {"text": " after."}]
        sink.write({"__key__": "parts", "0.npy": values[0], "1.npy": values[3], "parts.json": parts})
        sink.write(
            {"__key__": "both", "npy": values[4], "png": Image.new("RGB", (40, 40)), "txt": "Both.", "json": {"sampling_rate": 2}}
        )
    before = (folder / "a.tar").read_bytes()
    summary = index(folder, tokenizer_folder)
    assert (folder / "a.tar").read_bytes() == before
    assert (summary["samples"], summary["series"], summary["images"]) == (7, 16, 1)
    assert summary["kinds"] == {"series": 4, "text": 2, "image": 1}
    found = {text: (rates, [len(array) for array in series]) for text, rates, series in heard(folder)}
    assert found == {
        "One.": ([100.0], [40]), "Unknown rate.": ([41 / 4], [41]), "An embedding.": ([], []),
        "A sound.": ([], []),
        "Many.": (rates, [40 + i for i in range(12)]), "Before  after.": ([9.0], [43]), "Both.": ([2.0], [44]),
    }  # fmt: skip
    members = set(Corpus(folder)._member_name.tolist())
    assert b"depth.npy" not in members


def tar(folder: Path, *samples: dict[str, bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as written:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                add(written, f"dir/{number}.{ending}", content)
    return folder


def parts_json(*parts: dict) -> bytes:
    return json.dumps([*parts, {"text": "A text."}]).encode()


RATE = b'{"sampling_rate": 5}'


def rated(values: np.ndarray, rate: bytes = b"5") -> dict[str, bytes]:
    return {"npy": npy(values), "json": b'{"sampling_rate": ' + rate + b"}", "txt": b"A text."}


@pytest.mark.parametrize(
    ("sample", "reason", "sentence"),
    [
        (rated(hole()), "series_not_finite", "The series 0 (npy) holds nan at point 17 of channel 2."),
        (rated(np.array([object()])), "series_dtype", "The series 0 (npy) holds values of type object"),
        (rated(noise(1, 9), b"0"), "series_rate", "The series 0 (npy) has the sampling rate 0;"),
        (rated(noise(1, 9), b"[1, 2]"), "series_rate", "sampling_rate has 2 numbers for 1 series"),
        ({"parts.json": parts_json({"series": "npy"})}, "series_missing", "names the series 'npy', which it does not hold."),
        ({"parts.json": parts_json({"image": "png"})}, "image_missing", "names the image 'png', which it does not hold."),
        ({"png": png(1), "parts.json": parts_json()}, "image_unplaced", "parts.json has no place for its image 'png'."),
        ({"png": b"\x89PNG", "txt": b"x"}, "image_unknown_format", "image 0 (png): "),
        ({"parts.json": parts_json({"series": "npy", "rate": "x"})}, "parts", "must have a finite number above 0 as 'rate'"),
        ({"parts.json": parts_json({"text": "<|image_pad|>", "special": True})}, "parts", "write an image part instead."),
        ({"parts.json": parts_json({"text": "<TS_CONTEXT>", "special": True})}, "parts", "write a series part instead."),
        ({"txt": b" "}, "empty", "its text is empty."),
        ({"png": png(1)}, "no_text", "it has neither a member txt nor a string under 'caption' of a .json."),
    ],
)
def test_the_first_sample_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, tokenizer_folder, sample, reason, sentence):
    folder = tar(tmp_path / "tars", {"txt": b"Good."}, sample, {"txt": b""})
    with pytest.raises(InputError, match=rf"2 of 3 samples .*{reason}.* allows 0\. The first is x\.tar: dir/1: ") as caught:
        index(folder, tokenizer_folder)
    assert sentence in str(caught.value)
    said: list[str] = []
    summary = index(folder, tokenizer_folder, max_bad_fraction=0.9, say=said.append)
    assert summary["stages"]["samples"]["dropped"] == ({"empty": 2} if reason == "empty" else {"empty": 1, reason: 1})
    assert said[0].startswith("x.tar: 1 samples, ")
    assert "; 2 left out, the first is x.tar: dir/1: " in said[0]


def test_a_member_that_comes_twice_is_refused_where_it_is_a_series(tmp_path, tokenizer_folder):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as written:
        for key, meta in (("a", b"{}"), ("b", RATE)):
            for name, content in (("npy", npy(noise(1, 9))), ("npy", npy(noise(2, 9))), ("json", meta), ("txt", b"A text.")):
                add(written, f"{key}.{name}", content)
    summary = index(folder, tokenizer_folder, max_bad_fraction=0.5)
    assert summary["stages"]["samples"]["dropped"] == {"member_twice": 1}
    assert summary["series"] == 0
