"""Names and shapes of Intern-S1-Pro's time-series encoder, from `ts_config` of config.json, in the order of its state dict.

A config without `ts_config`, as the published one is, has no encoder that is computed here. Names and keys are those of
LMDeploy's serving code, which fixes some sizes: num_mel_bins 80, ts_adapt_in_dim 256 and the optional ones below.
"""

from collections.abc import Iterator
from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import TimeSeriesArchitecture
from moexpand.upcycle.family import Config
from moexpand.upcycle.safetensors_file import Shape

ENCODER = "model.time_series."
PLACES = f"{ENCODER}encoder_embed.pos_encoder.pe"
"""The table of a point's places in its patch: files may hold it, but it follows from its formula."""
TOKEN = 151_685
"""Intern-S1-Pro's <TS_CONTEXT>, where config.json gives no `ts_token_id`."""

ACTIVATION = "gelu"

_SIZES = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions", "num_mel_bins",
    "ts_adapt_in_dim", "ts_hidden_dim", "out_hidden_size",
)  # fmt: skip
_OPTIONAL = {"patch_heads": 8, "patch_ffn_dim": 2048, "longest_patch": 20_000}

Named = Iterator[tuple[str, Shape]]


def encoder_architecture(config: Config, where: str) -> TimeSeriesArchitecture | None:
    """The encoder that a config.json describes, or None.

    Raises:
        InputError: a key of `ts_config` is missing or no size, or sizes contradict each other.
    """
    sizes, token = config.get("ts_config"), config.get("ts_token_id", TOKEN)
    if sizes is None:
        return None
    if not isinstance(sizes, dict):
        raise InputError(f"{where} has ts_config={sizes!r}; the sizes of a time-series encoder are needed.")
    found: dict[str, Any] = {key: sizes.get(key) for key in _SIZES} | {
        key: sizes.get(key, usual) for key, usual in _OPTIONAL.items()
    }
    for key, value in found.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{where} has {key}={value!r} in ts_config; a whole number of at least 1 is needed.")
    activation = sizes.get("activation_function", ACTIVATION)
    if activation != ACTIVATION:
        raise InputError(f"{where} has activation_function={activation!r} in ts_config; {ACTIVATION} alone is computed.")
    out = sizes.get("ts_adapt_out_dim", found["ts_hidden_dim"])
    if out != found["ts_hidden_dim"]:
        raise InputError(
            f"{where} has ts_adapt_out_dim={out!r} and ts_hidden_dim={found['ts_hidden_dim']} in ts_config; they must be equal."
        )
    if type(token) is not int or token < 0:
        raise InputError(f"{where} has ts_token_id={token!r}; the number of a token is needed.")
    encoder = TimeSeriesArchitecture(**found, ts_token_id=token)
    check_encoder(encoder, f"ts_config of {where}")
    return encoder


def check_encoder(encoder: TimeSeriesArchitecture, where: str) -> None:
    """Refuse widths that heads do not divide, with an `InputError` that says which."""
    for name, width, heads in (
        ("d_model", encoder.d_model, encoder.encoder_attention_heads),
        ("half of ts_adapt_in_dim", encoder.ts_adapt_in_dim // 2, encoder.patch_heads),
    ):
        if width % heads:
            raise InputError(f"{where}: {name}={width} is not a multiple of its {heads} attention heads.")
    if encoder.ts_adapt_in_dim % 4:
        raise InputError(f"{where}: ts_adapt_in_dim={encoder.ts_adapt_in_dim} is not a multiple of 4.")


def encoder_tensors(config: Config, where: str) -> dict[str, Shape]:
    """Parameters of the encoder; none without `ts_config`."""
    encoder = encoder_architecture(config, where)
    return {} if encoder is None else {ENCODER + name: shape for name, shape in _parameters(encoder)}


def _parameters(encoder: TimeSeriesArchitecture) -> Named:
    narrow, wide, out = encoder.ts_adapt_in_dim // 2, encoder.d_model, encoder.out_hidden_size
    yield from _weights("encoder_embed.conv", (narrow, 1, 5))
    layer = "encoder_embed.transformer_encoder.layers.0"
    yield f"{layer}.self_attn.in_proj_weight", (3 * narrow, narrow)
    yield f"{layer}.self_attn.in_proj_bias", (3 * narrow,)
    yield from _weights(f"{layer}.self_attn.out_proj", (narrow, narrow))
    yield from _weights(f"{layer}.linear1", (encoder.patch_ffn_dim, narrow))
    yield from _weights(f"{layer}.linear2", (narrow, encoder.patch_ffn_dim))
    yield from _weights(f"{layer}.norm1", (narrow,))
    yield from _weights(f"{layer}.norm2", (narrow,))
    yield from _weights("encoder.adapt_in", (encoder.num_mel_bins, encoder.ts_adapt_in_dim))
    yield from _weights("encoder.conv1", (wide, encoder.num_mel_bins, 3))
    yield from _weights("encoder.conv2", (wide, wide, 3))
    yield "encoder.embed_positions.weight", (encoder.max_source_positions, wide)
    for number in range(encoder.encoder_layers):
        layer = f"encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (wide, wide)
            if name != "k_proj":
                yield f"{layer}.self_attn.{name}.bias", (wide,)
        yield from _weights(f"{layer}.self_attn_layer_norm", (wide,))
        yield from _weights(f"{layer}.fc1", (encoder.encoder_ffn_dim, wide))
        yield from _weights(f"{layer}.fc2", (wide, encoder.encoder_ffn_dim))
        yield from _weights(f"{layer}.final_layer_norm", (wide,))
    yield from _weights("encoder.layer_norm", (wide,))
    yield from _weights("encoder.adapt_out", (encoder.ts_hidden_dim, wide))
    yield from _weights("projector.layer_norm", (encoder.ts_hidden_dim,))
    yield from _weights("projector.linear_1", (out, encoder.ts_hidden_dim))
    yield from _weights("projector.linear_2", (out, out))


def _weights(name: str, shape: Shape) -> Named:
    """A weight and its bias, of a linear layer or convolution [out, ...] or of a norm [size]."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
