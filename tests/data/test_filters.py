"""Thresholds: what lies on one is kept, what lies beyond it is dropped under its name."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.filters import Thresholds, drop_reason
from moexpand.data.measures import measure

GOOD = {
    "characters": 1000,
    "visible": 800,
    "symbol_ratio": 0.1,
    "repetition": 0.0,
    "ngram_repetition": 0.05,
    "language": "en",
    "language_probability": 0.9,
    "exact": "00" * 16,
    "minhash": None,
    "phash": [],
    "ink": [30.0],
    "refused_images": [],
    "agreement": 0.5,
    "score": 0.5,
}
LIMITS = Thresholds(100, 0.4, 0.5, 0.8, ("en", "zh"), 0.7, 0.2, 1.0, 0.3)
CASES = [  # measure, on its threshold, beyond it, reason, only for running text
    ("characters", 100, 99, "too_short", True),
    ("symbol_ratio", 0.4, 0.4001, "symbols", True),
    ("repetition", 0.5, 0.5001, "repetition", True),
    ("ngram_repetition", 0.8, 0.8001, "ngram_repetition", True),
    ("language", "zh", "de", "language", False),
    ("language_probability", 0.7, 0.699, "language_unclear", False),
    ("agreement", 0.2, 0.1999, "agreement", False),
    ("ink", [30.0, 1.0], [30.0, 0.99], "blank_image", False),
    ("score", 0.3, 0.2999, "score", False),
    ("refused_images", [], ["broken"], "unreadable_image", False),
    ("visible", 1, 0, "empty", False),
]


@pytest.mark.parametrize(("name", "kept", "dropped", "reason", "text_only"), CASES, ids=[case[3] for case in CASES])
def test_a_value_on_the_threshold_stays_and_one_beyond_goes_under_its_name(name, kept, dropped, reason, text_only):
    assert drop_reason("text", GOOD | {name: kept}, LIMITS) is None
    assert drop_reason("text", GOOD | {name: dropped}, LIMITS) == reason
    for kind in ("figure", "table", "chat", "record"):
        assert drop_reason(kind, GOOD | {name: dropped}, LIMITS) == (None if text_only else reason)


def test_every_threshold_has_a_case():
    assert len(CASES) == len(fields(Thresholds)) + 2  # refused images and empty texts have none


def test_what_could_not_be_measured_refuses_nothing():
    unknown = {"language": None, "language_probability": None, "agreement": None, "ink": [None], "score": None}
    assert drop_reason("figure", GOOD | unknown, LIMITS) is None
    assert drop_reason("figure", {key: value for key, value in (GOOD | unknown).items() if key != "score"}, LIMITS) is None


@given(st.sampled_from(["text", "figure"]), st.lists(st.sampled_from(CASES), unique_by=lambda case: case[0]))
def test_a_record_is_dropped_if_and_only_if_one_of_its_measures_is_beyond_a_threshold(kind, cases):
    measures = GOOD | {name: dropped for name, _, dropped, _, _ in cases}
    reasons = {reason for _, _, _, reason, text_only in cases if kind == "text" or not text_only}
    found = drop_reason(kind, measures, LIMITS)
    assert found in reasons if reasons else found is None


def test_the_defaults_keep_any_language_code_tables_and_figures():
    for kind, text in (
        (
            "text",
            "Der Schmelzpunkt der Legierung steigt mit dem Druck, wie das Phasendiagramm in der Abbildung zeigt. " * 2,
        ),
        ("text", "合金的熔点随压力升高而升高，如下图中的相图所示。" + "".join(map(chr, range(0x4E00, 0x4E00 + 300)))),
        ("text", "\n".join(f"for (int i{n} = 0; i{n} < size; i{n}++) total += values[i{n}] * weight;" for n in range(8))),
        ("figure", "Figure 1: PCA"),
        ("table", "Table 2: 1.0 2.0 3.0 4.0"),
    ):
        assert drop_reason(kind, measure({"text": text}, Path()), Thresholds()) is None, text


def test_the_defaults_drop_what_says_one_thing_over_and_over():
    assert (
        drop_reason("text", measure({"text": "buy the best watch now and save " * 30}, Path()), Thresholds())
        == "ngram_repetition"
    )
    assert drop_reason("text", measure({"text": "The same line again.\n" * 30}, Path()), Thresholds()) == "repetition"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_symbol_ratio", 1.1),
        ("max_repetition", -0.1),
        ("min_language_probability", 70),
        ("min_characters", -1),
        ("min_ink", -1.0),
    ],
)
def test_thresholds_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"filters\.{name} is {value}"):
        Thresholds(**{name: value})
