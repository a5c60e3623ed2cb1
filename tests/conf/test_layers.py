"""Factors of single layers."""

from moexpand.conf.layers import layer_factors


def test_layers_that_no_word_names_have_factor_one() -> None:
    assert layer_factors("key", ["0-1x4", "3x0.5"], 5) == (4.0, 4.0, 1.0, 0.5, 1.0)
    assert layer_factors("key", ["2x1e-3"], 3) == (1.0, 1.0, 0.001)


def test_without_words_there_are_no_factors() -> None:
    assert layer_factors("key", [], 5) == ()
