"""The time-series encoder: lengths by the formulas, values by another computation, memory that does not grow with the series."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.base.series import padded_length, patches_of, stride_of, tokens_of
from moexpand.parallel.shape import TimeSeriesShape
from moexpand.parallel.time_series import TimeSeriesEncoder

SMALL = TimeSeriesShape(
    d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, max_source_positions=6, num_mel_bins=10,
    ts_adapt_in_dim=32, ts_hidden_dim=24, out_hidden_size=20, ts_token_id=7, patch_heads=4, patch_ffn_dim=40, longest_patch=400,
)  # fmt: skip
RATES = [0.001, 0.01, 0.3, 1, 10, 50, 100, 180, 250, 500, 999, 1000, 1500, 2000, 5000, 44_100, 1e6]
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 100, 319, 320, 321, 12_345, 10**6]


def served(length: int, rate: float) -> tuple[int, int, int]:
    """Stride, patches and tokens as the serving code computes them in torch, without the least number of patches."""
    sr = torch.as_tensor(rate, dtype=torch.float32)
    stride = torch.floor(160 / ((1 + torch.exp(-sr / 100)) ** 6))
    patches = torch.ceil((torch.tensor(length) - 2 * stride) / stride) + 1
    return int(stride), int(patches), (int(patches) // 2 + 1) // 2


@pytest.mark.parametrize("rate", RATES)
def test_lengths_and_strides_are_those_of_the_formulas(rate: float) -> None:
    for length in LENGTHS:
        stride, patches, tokens = served(length, rate)
        assert stride_of(rate) == stride
        assert patches_of(length, rate) == max(2, patches)
        assert tokens_of(length, rate) == (tokens if patches >= 2 else 1)
        assert padded_length(length, rate) == (patches_of(length, rate) - 1) * stride + 2 * stride >= length


def test_published_strides() -> None:
    assert [stride_of(rate) for rate in (0.01, 10, 100, 500, 1e4, 1e6)] == [2, 3, 24, 153, 160, 160]


@given(st.integers(1, 10**6), st.floats(1e-3, 1e6))
def test_every_series_yields_a_token_and_loses_no_point(length: int, rate: float) -> None:
    stride, patches = stride_of(rate), patches_of(length, rate)
    assert 2 <= stride <= 160
    assert tokens_of(length, rate) >= 1
    assert (patches + 1) * stride >= length, "the last patch reaches the end"
    assert patches == 2 or (patches - 1) * stride + stride < length, "and one patch fewer would not"


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, "10", None])
def test_a_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(InputError, match="sampling rate"):
        stride_of(rate)  # type: ignore[arg-type]


def test_an_empty_series_is_refused() -> None:
    with pytest.raises(InputError, match="0 points"):
        patches_of(0, 10)


@pytest.fixture(scope="module")
def encoder() -> TimeSeriesEncoder:
    torch.manual_seed(0)
    made = TimeSeriesEncoder(SMALL, torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def by_hand(encoder: TimeSeriesEncoder, series: np.ndarray, rate: float) -> np.ndarray:
    """The formulas in numpy, patch by patch and channel by channel."""
    weights = {name: value.detach().numpy() for name, value in encoder.state_dict().items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        )

    def conv(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        """[points, in] by [out, in, k] to [points / stride, out]."""
        kernel = weights[f"{name}.weight"]
        size = kernel.shape[2]
        wide = np.pad(x, ((size // 2, size // 2), (0, 0)))
        rows = [np.einsum("ki,oik->o", wide[at : at + size], kernel) for at in range(0, len(x), stride)]
        return np.array(rows) + weights[f"{name}.bias"]

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, causal: bool) -> np.ndarray:
        width, outs = q.shape[1] // heads, []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = q[:, own] @ k[:, own].T / math.sqrt(width)
            if causal:
                scores = scores + np.triu(np.full(scores.shape, -np.inf), 1)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            outs.append(scores / scores.sum(-1, keepdims=True) @ v[:, own])
        return np.concatenate(outs, -1)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def patch(values: np.ndarray) -> np.ndarray:
        x = np.maximum(conv(values[:, None], "encoder_embed.conv"), 0)
        place = np.arange(len(x))[:, None] * np.exp(np.arange(0, x.shape[1], 2) * (-math.log(10_000) / x.shape[1]))
        x[:, 0::2] += np.sin(place)
        x[:, 1::2] += np.cos(place)
        layer = "encoder_embed.transformer_encoder.layers.0"
        width = x.shape[1]
        joint = x @ weights[f"{layer}.self_attn.in_proj_weight"].T + weights[f"{layer}.self_attn.in_proj_bias"]
        mixed = attention(joint[:, :width], joint[:, width : 2 * width], joint[:, 2 * width :], SMALL.patch_heads, causal=False)
        x = norm(x + linear(mixed, f"{layer}.self_attn.out_proj"), f"{layer}.norm1")
        x = norm(x + linear(np.maximum(linear(x, f"{layer}.linear1"), 0), f"{layer}.linear2"), f"{layer}.norm2")
        return x.mean(0)

    stride, patches = stride_of(rate), patches_of(len(series), rate)
    filled = np.pad(series, ((0, padded_length(len(series), rate) - len(series)), (0, 0)))
    encoded = np.array(
        [
            np.mean([patch(filled[at * stride : (at + 2) * stride, channel]) for channel in range(series.shape[1])], axis=0)
            for at in range(patches)
        ]
    )
    frames = np.array([np.concatenate(encoded[2 * at : 2 * at + 2]) for at in range(patches // 2)])
    x = gelu(conv(gelu(conv(linear(frames, "encoder.adapt_in"), "encoder.conv1")), "encoder.conv2", stride=2))
    table = weights["encoder.embed_positions.weight"]
    x[: len(table)] += table[: len(x)]
    for number in range(SMALL.encoder_layers):
        layer = f"encoder.layers.{number}"
        own = norm(x, f"{layer}.self_attn_layer_norm")
        q, k, v = (linear(own, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        x = x + linear(attention(q, k, v, SMALL.encoder_attention_heads, causal=True), f"{layer}.self_attn.out_proj")
        x = x + linear(gelu(linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1")), f"{layer}.fc2")
    x = linear(norm(x, "encoder.layer_norm"), "encoder.adapt_out")
    return linear(gelu(linear(norm(x, "projector.layer_norm"), "projector.linear_1")), "projector.linear_2")


@pytest.mark.parametrize(
    ("length", "channels", "rate"), [(1, 1, 1.0), (5, 3, 0.01), (90, 2, 10.0), (61, 1, 10.0), (700, 2, 100.0), (330, 1, 1e6)]
)
def test_features_are_the_formulas_in_float64(encoder: TimeSeriesEncoder, length: int, channels: int, rate: float) -> None:
    series = np.random.default_rng(length).normal(size=(length, channels))
    (found,) = encoder([torch.from_numpy(series)], [rate])
    assert found.shape == (tokens_of(length, rate), SMALL.out_hidden_size)
    assert np.abs(found.detach().numpy() - by_hand(encoder, series, rate)).max() < 1e-9


def test_a_series_has_the_same_features_and_gradients_whatever_it_is_batched_with(encoder: TimeSeriesEncoder) -> None:
    drawn = np.random.default_rng(1)
    series = [torch.from_numpy(drawn.normal(size=(length, channels))) for length, channels in ((5, 1), (300, 4), (41, 2))]
    rates = [1.0, 50.0, 0.5]
    together = encoder(series, rates)
    for own, rate, features in zip(series, rates, together, strict=True):
        assert torch.equal(encoder([own], [rate])[0], features)
    encoder.zero_grad()
    sum(features.sin().sum() for features in together).backward()
    whole = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    for own, rate in zip(series, rates, strict=True):
        encoder([own], [rate])[0].sin().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert torch.allclose(parameter.grad, whole[name], atol=1e-10), name
        if name != "encoder.embed_positions.weight":
            assert whole[name].abs().max() > 0, name


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9))
def test_chunks_change_nothing(encoder: TimeSeriesEncoder, patches: int) -> None:
    from moexpand.parallel import time_series

    series = torch.from_numpy(np.random.default_rng(2).normal(size=(120, 2)))
    (due,) = encoder([series], [10.0])
    kept = time_series.CHUNK
    try:
        time_series.CHUNK = patches * 2 * 2 * stride_of(10.0)
        (found,) = encoder([series], [10.0])
    finally:
        time_series.CHUNK = kept
    assert torch.allclose(found, due, atol=1e-12)


MILLION = """
import resource
import sys
import torch
from moexpand.base.series import tokens_of
from moexpand.parallel.shape import TimeSeriesShape
from moexpand.parallel.time_series import TimeSeriesEncoder
torch.set_num_threads(2)
encoder = TimeSeriesEncoder(TimeSeriesShape(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
    max_source_positions=1500, num_mel_bins=80, ts_adapt_in_dim=16, ts_hidden_dim=64, out_hidden_size=64, ts_token_id=0,
    patch_heads=1, patch_ffn_dim=16))
points, rate, backward = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "backward"
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.set_grad_enabled(backward):
    (features,) = encoder([torch.randn(points, 1)], [rate])
if backward:
    features.sum().backward()
assert features.shape == (tokens_of(points, rate), 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_million_points_at_1_khz_and_more_take_bounded_memory() -> None:
    """In a process of its own; attention over all patches at once would take 2.4 GiB for its scores alone.

    Forward with the million; forward and backward with a tenth of it, and hardly more memory.
    """
    for points, rate, passes in ((1_000_000, 1000.0, "forward"), (1_000_000, 1e6, "forward"), (100_000, 1000.0, "backward")):
        words = [sys.executable, "-c", MILLION, str(points), str(rate), passes]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 500, f"{done.stdout.strip()} MiB at {rate} Hz, {passes}"


def test_the_layer_of_a_patch_is_torchs_encoder_layer(encoder: TimeSeriesEncoder) -> None:
    own = encoder.encoder_embed.transformer_encoder
    layer = torch.nn.TransformerEncoderLayer(
        16, SMALL.patch_heads, SMALL.patch_ffn_dim, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    torchs = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    torchs.load_state_dict(own.state_dict())
    x = torch.randn(5, 20, 16, dtype=torch.float64)
    assert torch.allclose(own(x), torchs(x), atol=1e-12)
