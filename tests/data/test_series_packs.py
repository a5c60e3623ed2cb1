"""Time series in packs: what a model gets of each, on any number of ranks, planned from the index alone."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.base.files import write_json
from moexpand.base.series import tokens_of
from moexpand.data import index as index_file
from moexpand.data.dataset import SUMMARY, summary_of
from moexpand.data.index import index_name, parse_index, write_index
from moexpand.data.loader import MicroBatch, PackedData
from moexpand.data.parts import Part
from moexpand.data.series import sampling_rate
from moexpand.data.shards import Sample, cached_tokenizer, write_shard
from moexpand.data.stream import Reading
from tests.data.series_maker import HEARD, hole, noise, npy, standardised
from tests.data.test_multimodal import IMAGES, epoch, picture, pieces, words, write_set

SEQ, BATCH = 256, 8
BOTH = Reading(series=True, images=IMAGES)


def write_series_set(folder: Path, samples: list[Sample], tokenizer: Path) -> Path:
    folder.mkdir()
    entries = [
        write_shard(folder, number, samples[begin : begin + 16], str(tokenizer))
        for number, begin in enumerate(range(0, len(samples), 16))
    ]
    write_json(folder / SUMMARY, summary_of(cached_tokenizer(str(tokenizer)), entries, {}, {}))
    return folder


Values = dict[str, list[tuple[np.ndarray, float | None]]]


@pytest.fixture(scope="module")
def made(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample], Values]:
    """48 samples: texts, series alone, three series of unequal length and channels between texts, a series beside a picture."""
    folder = tmp_path_factory.mktemp("series")
    samples, values = [], {}

    def keep(key: str, number: int, points: int, channels: int, rate: float | None) -> tuple[Part, Path]:
        shape = (points,) if channels == 1 else (points, channels)
        values.setdefault(key, []).append((noise(number, *shape), rate))
        path = folder / f"{key}-{len(values[key])}.npy"
        path.write_bytes(npy(values[key][-1][0]))
        return {"series": "npy"} | ({} if rate is None else {"rate": rate}), path

    for number in range(48):
        rng = np.random.default_rng(number)
        text: Part = {"text": words(number, 5 + 3 * number % 60)}
        key = f"s-{number:02d}"
        if number % 4 == 0:
            samples.append(Sample(key, "text", [text]))
        elif number % 4 == 1:
            part, path = keep(key, number, int(rng.integers(1, 400)), 1, None)
            samples.append(Sample(key, "series", [part, text], series={"npy": path}))
        elif number % 4 == 2:
            three = [keep(key, number + i, int(rng.integers(1, 300)), i + 1, (None, 100.0, 2500.0)[i]) for i in range(3)]
            parts = [part | {"series": f"{i}.npy"} for i, (part, _) in enumerate(three)]
            mixed = [{"text": "Hear:"}, parts[0], text, *parts[1:], {"text": " <TS_CONTEXT> end", "loss": False}]
            samples.append(Sample(key, "series", mixed, series={f"{i}.npy": path for i, (_, path) in enumerate(three)}))
        else:
            part, path = keep(key, number, int(rng.integers(50, 900)), 2, float(rng.integers(1, 5000)))
            image = picture(folder / f"{number}.png", 50, 70, number)
            samples.append(Sample(key, "image", [{"image": "png"}, text, part], {}, {"png": image}, {"npy": path}))
    return write_series_set(folder / "shards", samples, tokenizer_folder), samples, values


def expected(sample: Sample, values: Values, folder: Path, images: bool = False) -> tuple[tuple[int, ...], list[bool]]:
    """Ids of a sample and what is trained on, from the rule of tokens and the tokenizer alone."""
    tokenizer = cached_tokenizer(str(folder))
    special = tokenizer.specials
    series = iter(values.get(sample.key, []))
    ids: list[int] = []
    loss: list[bool] = []
    for part in sample.parts:
        inside: list[int] = []
        if "series" in part:
            array, rate = next(series)
            count = tokens_of(len(array), sampling_rate(len(array), rate))
            inside = [special["<|ts|>"], *[special["<TS_CONTEXT>"]] * count, special["<|/ts|>"]]
        elif "image" in part and images:
            inside = [special["<|vision_start|>"], *[special["<|image_pad|>"]] * 4, special["<|vision_end|>"]]
        elif "text" in part:
            text = tokenizer.encode(part["text"])
            ids += text
            loss += [part.get("loss", True)] * len(text)
        ids += inside
        loss += [False] * len(inside)
    return (*ids, tokenizer.eos_id), [*loss, loss[-1]]


def test_every_series_reaches_the_model_in_the_order_of_its_tokens(made, tokenizer_folder):
    shards, samples, values = made
    data = PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=HEARD)
    assert data.has_series
    assert not data.has_pictures
    assert data.series_token == cached_tokenizer(str(tokenizer_folder)).specials["<TS_CONTEXT>"]
    assert not data.left_out()
    batches = epoch(data)
    wanted, arrays = {}, {}
    for sample in samples:
        ids, loss = expected(sample, values, tokenizer_folder)
        wanted[ids] = (*(int(flag) for flag in loss[1:]), 0)
        arrays[ids] = values.get(sample.key, [])
    assert pieces(batches) == wanted
    several = 0
    for batch in batches:
        mine = []
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mine += arrays.get(tuple(batch.tokens[begin:end].tolist()), [])
        several = max(several, len(mine))
        if not mine:
            assert batch.series is None
            assert batch.rates is None
            continue
        assert batch.rates == [sampling_rate(len(array), rate) for array, rate in mine]
        for series, (array, _) in zip(batch.series, mine, strict=True):
            assert series.dtype == np.float32
            np.testing.assert_allclose(series, standardised(array), rtol=1e-6, atol=1e-6)
        count = int((batch.tokens == data.series_token).sum())
        assert count == sum(tokens_of(len(series), rate) for series, rate in zip(batch.series, batch.rates, strict=True))
    assert several > 3


def test_series_and_pictures_are_read_together_or_each_alone(made, tokenizer_folder):
    shards, samples, values = made
    both = PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=replace(BOTH, images=replace(IMAGES, max_pixels=64 * 64)))
    assert both.has_series
    assert both.has_pictures
    assert set(pieces(epoch(both))) == {expected(sample, values, tokenizer_folder, images=True)[0] for sample in samples}
    special = cached_tokenizer(str(tokenizer_folder)).specials
    marks = {special[name] for name in ("<|ts|>", "<TS_CONTEXT>", "<|/ts|>")}
    alone = PackedData(shards, SEQ, 1, seed=1, held_out=0.0)
    assert not alone.has_series
    wanted = {tuple(token for token in expected(sample, values, tokenizer_folder)[0] if token not in marks) for sample in samples}
    batches = epoch(alone)
    assert set(pieces(batches)) == wanted
    assert all(batch.series is None and batch.patches is None for batch in batches)


def as_bytes(batch: MicroBatch) -> bytes:
    arrays = [batch.tokens, batch.loss_mask, batch.cu_seqlens, *(batch.series or []), np.array(batch.rates or [])]
    return b"".join(array.tobytes() for array in arrays)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (2, 2), (1, 4)]), st.integers(0, 40))
def test_series_are_the_same_and_level_for_every_number_of_ranks(made, layout, step):
    ranks, micro_batch = layout
    data = PackedData(made[0], SEQ, BATCH, seed=3, held_out=0.0, reading=BOTH)
    whole = data.batch(step, micro_batch=micro_batch)
    shared = [batch for rank in range(ranks) for batch in data.batch(step, rank, ranks, micro_batch)]
    assert sorted(map(as_bytes, whole)) == sorted(map(as_bytes, shared))
    one_by_one = data.batch(step)
    assert sorted(array.tobytes() for batch in shared for array in batch.series or []) == sorted(
        array.tobytes() for batch in one_by_one for array in batch.series or []
    )
    places = [data.tokenizer.specials["<|image_pad|>"], data.series_token]
    counted = [
        sum(int(np.isin(batch.tokens, places).sum()) for batch in data.batch(step, rank, ranks, micro_batch))
        for rank in range(ranks)
    ]
    assert counted == data.vision_tokens(step, ranks, micro_batch).tolist()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30_000), st.none() | st.floats(0.01, 1e5)), min_size=1, max_size=4))
def test_planned_lengths_are_encoded_lengths(tokenizer_folder, tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("planned")
    parts: list[Part] = [{"text": "Some"}]
    files = {}
    for number, (points, rate) in enumerate(entries):
        files[f"{number}.npy"] = folder / f"{number}.npy"
        files[f"{number}.npy"].write_bytes(npy(np.arange(points, dtype=np.int8)))
        parts.append({"series": f"{number}.npy"} | ({} if rate is None else {"rate": rate}))
    shards = write_series_set(folder / "shards", [Sample("a", "series", parts, series=files)], tokenizer_folder)
    stream = PackedData(shards, 1 << 20, 1, seed=0, held_out=0.0, reading=HEARD).streams[0]
    assert len(stream.encoded(0).ids) == stream.lengths[0]


def test_a_series_that_does_not_fit_is_left_out_whole_and_told(made, tokenizer_folder):
    shards, samples, values = made
    long = [s for s in samples if s.key in values and len(expected(s, values, tokenizer_folder)[0]) > 100]
    data = PackedData(shards, 100, 1, seed=1, held_out=0.0, reading=HEARD)
    assert long
    assert data.left_out() == [
        f"{len(long)} of 48 samples of {shards} with a series are longer than seq_length=100 tokens and are left out"
    ]
    whole = {expected(s, values, tokenizer_folder)[0] for s in samples if s.key in values and s not in long}
    assert whole <= set(pieces(epoch(data)))
    none = PackedData(shards, 12, 1, seed=1, held_out=0.0, reading=HEARD)
    assert not none.has_series
    assert all(batch.series is None for batch in none.batch(0))


def test_a_tokenizer_without_the_tokens_is_refused_before_the_first_step(made, tmp_path):
    text, heard = made[1][0], made[1][1]
    without = write_set(tmp_path / "without", [text, heard])
    assert len(PackedData(without, SEQ, 1, seed=0, held_out=0.0).batch(0)) == 1
    with pytest.raises(InputError, match=r"The tokenizer qwen-8192 has no <\|ts\|>, and time series need"):
        PackedData(without, SEQ, 1, seed=0, held_out=0.0, reading=HEARD)


def test_a_series_that_went_bad_costs_its_own_sample_and_is_named(made, tokenizer_folder, tmp_path):
    sample = made[1][2]
    (tmp_path / "hole.npy").write_bytes(npy(hole()))
    series = sample.series | {"2.npy": tmp_path / "hole.npy"}
    # The index is written from headers, as others' programs might write it.
    shards = write_series_set(tmp_path / "shards", [replace(sample, series=series), *made[1][3:20]], tokenizer_folder)
    with pytest.raises(
        InputError, match=r"The series 2 of the sample .*shard-000000\.tar: s-02 holds nan at point 17 of channel 2\."
    ):
        epoch(PackedData(shards, SEQ, 1, seed=0, held_out=0.0, reading=HEARD))
    tolerant = PackedData(shards, SEQ, 1, seed=0, held_out=0.0, max_bad_fraction=0.1, reading=HEARD)
    epoch(tolerant)
    assert list(tolerant.bad_samples) == ["s-02"]
    assert set(pieces(epoch(PackedData(shards, SEQ, 1, seed=0, held_out=0.0))))


def rewritten_as_version_2(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexes of a set without series as they were written before there were any."""
    arrays = [name for name in index_file._ARRAYS if not name.startswith("series_")]
    indexes = [
        parse_index((shards / index_name(tar.name)).read_bytes(), tar.name, "index") for tar in sorted(shards.glob("*.tar"))
    ]
    with monkeypatch.context() as patched:
        patched.setattr(index_file, "_ARRAYS", arrays)
        patched.setattr(index_file, "VERSION", 2)
        for index in indexes:
            write_index(shards, index)
    summary = json.loads((shards / SUMMARY).read_text())
    for entry in (summary, *summary["shards"]):
        del entry["series"]
    write_json(shards / SUMMARY, summary)


def test_an_index_of_version_2_is_read_and_a_run_on_it_goes_on(tmp_path, monkeypatch):
    samples = [Sample(f"t-{i}", "text", [{"text": words(i, 20)}]) for i in range(12)]
    image = picture(tmp_path / "a.png", 50, 70, 1)
    samples.append(Sample("f-0", "figure", [{"image": "png"}, {"text": "A figure."}], {}, {"png": image}))
    shards = write_set(tmp_path / "shards", samples)
    assert json.loads((shards / SUMMARY).read_text())["series"] == 0
    new = PackedData(shards, SEQ, 2, seed=0, held_out=0.0, reading=BOTH)
    batches = [as_bytes(batch) for batch in epoch(new)]
    rewritten_as_version_2(shards, monkeypatch)
    old = PackedData(shards, SEQ, 2, seed=0, held_out=0.0, reading=BOTH)
    assert old.corpus_fingerprint == new.corpus_fingerprint
    assert not old.has_series
    assert [as_bytes(batch) for batch in epoch(old)] == batches
    monkeypatch.setattr(index_file, "VERSION", 4)
    write_index(shards, parse_index((shards / "shard-000000.index.npz").read_bytes(), "shard-000000.tar", "index"))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"has version 4, and this program reads the versions 2 and 3; build the shards again"):
        PackedData(shards, SEQ, 2, seed=0)


def test_the_fingerprint_knows_of_series_only_where_they_are_read(made):
    def fingerprint(reading: Reading) -> str:
        return PackedData(made[0], SEQ, 1, seed=0, held_out=0.0, reading=reading).corpus_fingerprint

    prints = [fingerprint(reading) for reading in (Reading(), HEARD, Reading(images=IMAGES), BOTH)]
    assert len(set(prints)) == 4
    stream = PackedData(made[0], SEQ, 1, seed=0, held_out=0.0).streams[0]
    said = stream.corpus.key_hash.tobytes() + (stream.lengths - 1).tobytes()
    assert prints[0] == hashlib.sha256(said).hexdigest()  # as it was before there were series: runs go on
