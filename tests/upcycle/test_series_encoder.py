"""What a config says of an encoder of time series, and where it is silent."""

from typing import Any

import pytest

from moexpand.base.errors import InputError
from moexpand.upcycle.config_json import read_architecture, with_vocabulary
from moexpand.upcycle.families.interns1_pro import PRESETS
from moexpand.upcycle.family import part_of
from moexpand.upcycle.series_encoder import PLACES

SIZES = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_source_positions": 20,
    "num_mel_bins": 8, "ts_adapt_in_dim": 256, "ts_hidden_dim": 16, "out_hidden_size": 4096,
}  # fmt: skip
CONFIG: dict[str, Any] = PRESETS["Intern-S1-Pro"] | {"ts_config": SIZES}


def test_a_silent_config_means_the_published_token_and_it_moves_with_the_vocabulary() -> None:
    encoder = read_architecture(CONFIG).time_series
    assert encoder is not None
    assert encoder.ts_token_id == 151_685
    moved = with_vocabulary(CONFIG, 300, {151_685: 7, 151_655: 8})
    assert (moved["ts_token_id"], moved["image_token_id"], moved["text_config"]["vocab_size"]) == (7, 8, 300)
    with pytest.raises(InputError, match="ts_token_id=151685, and the child's vocabulary has no such token"):
        with_vocabulary(CONFIG, 300, {151_655: 8})


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="ts_token_id=155008 is outside the vocabulary of 155,008 tokens"):
        read_architecture(CONFIG | {"ts_token_id": 155_008})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder_attention_heads": 5}, "d_model=32 is not a multiple of its 5 attention heads"),
        ({"ts_adapt_in_dim": 20}, "half of ts_adapt_in_dim=10 is not a multiple of its 8 attention heads"),
        ({"encoder_layers": 0}, "encoder_layers=0 in ts_config; a whole number of at least 1 is needed"),
        ({"activation_function": "relu"}, "activation_function='relu' in ts_config; gelu alone is computed"),
        ({"ts_adapt_out_dim": 17}, "ts_adapt_out_dim=17 and ts_hidden_dim=16 in ts_config; they must be equal"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_architecture(CONFIG | {"ts_config": SIZES | changes})


def test_no_sizes_are_no_encoder_and_the_table_of_places_is_no_parameter() -> None:
    assert read_architecture(PRESETS["Intern-S1-Pro"]).time_series is None
    assert part_of(PLACES) == "buffers"
