"""A time series is read with bounded cost, standardised as the model takes it, counted in tokens unread, or refused by name."""

import io
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format

from moexpand.base.errors import InputError
from moexpand.base.series import tokens_of, tokens_of_many
from moexpand.data.parts import SERIES_TOKENS, check_parts, encode_parts, encode_text, series_ids, text_part
from moexpand.data.series import CHANNELS, REASONS, BadSeries, read_series, sampling_rate
from moexpand.data.tokens import Tokenizer, load_tokenizer
from tests.data.series_maker import noise, npy, standardised


@pytest.fixture(scope="module")
def with_series(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_folder))


# ------------------------------------------------------------------ what a model takes


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<u4", "<i8", "<f2", ">f4", "<f4", "<f8", ">f8"])
@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (1, 1), (64, 3), (5, 40)])
def test_every_channel_is_standardised_over_time_by_the_formula_in_float64(dtype, shape):
    values = (noise(3, *shape) * (1 if "f" in dtype else 10)).clip(-100, 100)
    values = np.abs(values).astype(dtype) if "u" in dtype else values.astype(dtype)
    for order in ("C", "F"):
        made = read_series(npy(np.asarray(values, order=order)))
        assert made.dtype == np.float32
        assert made.shape == (shape[0], shape[1] if len(shape) == 2 else 1)
        np.testing.assert_allclose(made, standardised(values), rtol=1e-6, atol=1e-6)


def test_a_constant_channel_becomes_zeros_and_nothing_is_cut_off():
    values = np.stack([np.full(50, 2.0), np.r_[np.zeros(49), 1e6]], axis=1)
    made = read_series(npy(values))
    assert not made[:, 0].any()
    assert made[-1, 1] == pytest.approx(7.0)


# ------------------------------------------------------------------ tokens


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1_000_000), st.none() | st.floats(1e-6, 1e7)), min_size=1, max_size=8))
@example([(1, None), (1_000_000, None), (319, 2500.0), (320, 1700.0), (3, 0.5)])
def test_planned_tokens_are_those_of_the_rule_for_every_length_and_rate(entries):
    rates = [sampling_rate(points, rate) for points, rate in entries]
    planned = tokens_of_many(np.array([points for points, _ in entries]), np.array(rates))
    assert planned.tolist() == [tokens_of(points, rate) for (points, _), rate in zip(entries, rates, strict=True)]


def test_without_a_rate_it_is_a_quarter_of_the_points_and_at_least_1_hz():
    assert [sampling_rate(points) for points in (1, 4, 5, 1000)] == [1.0, 1.0, 1.25, 250.0]
    assert sampling_rate(1000, 100) == 100.0


def test_a_series_becomes_its_tokens_between_its_marks_without_loss(with_series):
    start, pad, end = series_ids(with_series)
    assert [with_series.specials[token] for token in SERIES_TOKENS] == [start, pad, end]
    parts = [
        text_part("A "),
        {"series": "0.npy"},
        text_part(" and "),
        {"series": "1.npy", "rate": 100.0},
        {"image": "png"},
        text_part("b"),
    ]
    check_parts(parts)
    encode = with_series.encode
    vision = [with_series.specials[token] for token in ("<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>")]
    first, second = [start, *[pad] * 3, end], [start, pad, end]
    whole = encode_parts(parts, with_series, [2], [3, 1])
    assert whole.ids.tolist() == [*encode("A "), *first, *encode(" and "), *second, *vision, *encode("b")]
    assert whole.loss.tolist() == [token not in {start, pad, end, *vision} for token in whole.ids.tolist()]
    alone = encode_parts(parts, with_series, None, [3, 1])
    assert alone.ids.tolist() == [token for token in whole.ids.tolist() if token not in vision]
    without = encode_parts(parts, with_series, [2])
    assert without.ids.tolist() == [token for token in whole.ids.tolist() if token not in (start, pad, end)]
    assert encode_text(parts, with_series).ids.tolist() == [*encode("A "), *encode(" and "), *encode("b")]
    with pytest.raises(InputError, match=r"has 2 series parts, but its series have \[3\] tokens"):
        encode_parts(parts, with_series, [2], [3])


def test_a_tokenizer_without_the_tokens_is_named(tokenizer):
    with pytest.raises(InputError, match=r"qwen-8192 has no <\|ts\|>, and time series need .*; leave series out, or use another"):
        encode_parts([{"series": "npy"}], tokenizer, None, [1])


def test_markup_cannot_write_a_place_of_a_series_and_plain_text_is_text(with_series):
    with pytest.raises(InputError, match="writes <TS_CONTEXT> as text; write a series part instead"):
        encode_parts([text_part("<|ts|><TS_CONTEXT><|/ts|>", special=True)], with_series, None)
    ids = encode_parts([text_part("<|ts|><TS_CONTEXT><|/ts|>")], with_series, None).ids
    assert not set(ids.tolist()) & set(series_ids(with_series))


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"series": "png"}, "must name the series by the ending of its member, 'npy' or '0.npy'"),
        ({"series": "../a.npy"}, "must name the series by the ending"),
        ({"series": 3}, "must have a string as 'series'"),
        ({"series": "npy", "loss": True}, "has the key 'loss', and a part with 'series' may only have rate, series"),
        ({"series": "npy", "image": "png"}, "must have either 'text', 'image' or 'series'"),
        *(
            ({"series": "npy", "rate": rate}, "must have a finite number above 0 as 'rate', in Hz")
            for rate in (0, -1.5, float("nan"), float("inf"), True, "100", None, 10**400)
        ),
    ],
)
def test_a_wrong_part_is_refused_with_what_is_wrong(part, problem):
    with pytest.raises(InputError, match="Part 0 of a sample") as caught:
        check_parts([part])
    assert problem in str(caught.value)


# ------------------------------------------------------------------ what is refused


def header(text: str, version: tuple[int, int] = (1, 0), values: bytes = b"") -> bytes:
    """A .npy file with a header of one's own."""
    size = len(text) + 1
    length = size.to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin-1") + b"\n" + values


def shaped(shape: str, descr: str = "'<f8'", values: bytes = b"") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", values=values)


def with_hole(value: float) -> np.ndarray:
    values = noise(1, 40, 3)
    values[17, 2] = value
    return values


def third_version() -> bytes:
    content = io.BytesIO()
    npy_format.write_array(content, np.zeros(3), version=(3, 0))
    return content.getvalue()


BAD = [
    (npy(with_hole(np.nan)), "not_finite", "The series holds nan at point 17 of channel 2."),
    (npy(with_hole(-np.inf)), "not_finite", "The series holds -inf at point 17 of channel 2."),
    (npy(np.r_[np.zeros(3), np.nan].astype(np.float16)), "not_finite", "The series holds nan at point 3 of channel 0."),
    (npy(np.array([1e200, -1e200])), "not_finite", "The series holds 1e+200 in channel 0, too large for a standard deviation."),
    (npy(np.zeros(0)), "empty", "has the shape [0] and so no value"),
    (npy(np.zeros((5, 0))), "empty", "has the shape [5, 0] and so no value"),
    (npy(np.zeros((2, 3, 4))), "shape", "has the shape [2, 3, 4]; [points] or [points, channels] is taken"),
    (npy(np.float64(3)), "shape", "has the shape []"),
    (npy(np.zeros((2, CHANNELS + 1), np.int8)), "shape", "has 1025 channels; at most 1024 are taken"),
    (npy(np.array([1, "a", None], object)), "dtype", "holds values of type object"),
    (npy(np.array([True, False])), "dtype", "holds values of type bool"),
    (npy(np.array([1j])), "dtype", "holds values of type complex128"),
    (npy(np.array(["a"])), "dtype", "holds values of type <U1"),
    (npy(np.zeros(3, [("a", "f4")])), "dtype", "holds values of type"),
    (npy(np.zeros(3, "m8[s]")), "dtype", "holds values of type timedelta64[s]"),
    (npy(np.zeros(1_000_001, np.int8)), "too_long", "has 1000001 points; at most 1000000 are taken"),
    (npy(noise(1, 100))[:-8], "broken", "announces 800 bytes of values, and its file holds 792"),
    (npy(noise(1, 100)) + b"\0", "broken", "announces 800 bytes of values, and its file holds 801"),
    (shaped("(900000, 100)"), "broken", "announces 720000000 bytes of values, and its file holds 0"),
    (shaped("(1000000, 1000)", "'|i1'"), "too_large", "has 1000000 points of 1000 channels; at most 134217728 values"),
    (shaped("(10**18,)"), "not_npy", "has a .npy header that cannot be read"),
    (shaped("(1000000000000000000,)"), "too_long", "has 1000000000000000000 points"),
    (shaped("(-5,)"), "empty", "has the shape [-5]"),
    (shaped("(True,)"), "not_npy", "has a .npy header that cannot be read"),
    (shaped("3"), "not_npy", "has a .npy header that cannot be read"),
    (shaped("(3,)", "'nonsense'"), "not_npy", "has a .npy header that cannot be read"),
    (shaped("(3,)", "('<f8', (3,))"), "dtype", "holds values of type"),
    (header("(" * 5000), "not_npy", "has a .npy header that cannot be read"),
    (header("[" * 3000), "not_npy", "has a .npy header that cannot be read"),
    (header("{}", (2, 0)), "not_npy", "has a .npy header that cannot be read"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "not_npy", "has a .npy header that cannot be read"),
    (third_version(), "not_npy", "is no .npy file of version 1.0 or 2.0 (3.0)"),
    (b"", "not_npy", "is no .npy file"),
    (b"\x93NUM", "not_npy", "is no .npy file"),
    (pickle.dumps(np.zeros(3)), "not_npy", "is no .npy file"),
    (b"PK\x03\x04 an archive of arrays", "not_npy", "is no .npy file"),
]


@pytest.mark.parametrize(("content", "reason", "sentence"), BAD, ids=range(len(BAD)))
def test_a_file_that_cannot_be_used_costs_little_and_has_a_reason_and_a_sentence(content, reason, sentence):
    tracemalloc.start()
    with pytest.raises(BadSeries) as caught:
        read_series(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == reason
    assert reason in REASONS
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("The series ")
    assert str(caught.value).endswith(".")
    assert peak < 1 << 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 127), st.integers(0, 255))
def test_damaged_files_give_a_series_or_a_reason_and_nothing_else(tail, place, byte):
    damaged = bytearray(npy(noise(2, 12, 2)))
    damaged[place] = byte
    for content in (bytes(damaged), npy(noise(2, 12, 2))[:128] + tail, tail, b"\x93NUMPY\x01\x00" + tail):
        try:
            assert np.isfinite(read_series(content)).all()
        except BadSeries as problem:
            assert problem.reason in REASONS


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "fast", True, [100], 10**400])
def test_a_rate_that_is_no_number_above_0_is_refused(rate):
    with pytest.raises(BadSeries, match=r"has the sampling rate .*; it must be a finite number above 0, in Hz") as caught:
        sampling_rate(10, rate)
    assert caught.value.reason == "rate"


def test_rates_of_parts_survive_json():
    part = {"series": "npy", "rate": 1 / 3}
    check_parts([json.loads(json.dumps(part))])
