"""The architecture of a model that is trained from scratch, from the keys `model.*`; nothing here imports torch."""

from dataclasses import fields

from moexpand.base.errors import InputError
from moexpand.conf.fields import changed
from moexpand.conf.model_schema import FAMILIES, Model, TimeSeriesModel, VisionModel
from moexpand.upcycle.architecture import Architecture, TimeSeriesArchitecture, VisionArchitecture
from moexpand.upcycle.positions import fope_frequencies
from moexpand.upcycle.series_encoder import check_encoder

OWN = {
    "vision.deepstack_visual_indexes": ("qwen3_vl_moe",),
    "vision": ("qwen3_vl_moe", "interns1_pro"),
    "time_series": ("interns1_pro",),
    "mrope_section": ("qwen3_vl_moe",),
    "fope_init_factor": ("interns1_pro",),
    "fope_sep_head": ("interns1_pro",),
}
"""Keys of `model` that have an effect on these families alone; the first that fits holds."""


def fresh_architecture(model: Model) -> Architecture:
    """The architecture; keys that belong to another family must be at their defaults.

    Raises:
        InputError: a key of another family, or sizes of the tower or of the positions that cannot be.
    """
    _refuse_keys_of_others(model)
    known = {field.name for field in fields(Architecture)}
    parts = ("vision", "time_series")
    own = {field.name: getattr(model, field.name) for field in fields(model) if field.name in known and field.name not in parts}
    own |= {"model_type": model.family, "mrope_section": _mrope_section(model)}
    if model.family != "qwen3_moe" and not model.norm_topk_prob:
        raise InputError(f"model.norm_topk_prob=false is for qwen3_moe; model.family={model.family} always normalises.")
    if model.family != "interns1_pro":
        return Architecture(**(own | {"fope_init_factor": 0.0}), vision=_vision(model))
    rules = {"fope_sep_head": model.fope_sep_head}
    kept = fope_frequencies(rules, model.rope_theta, model.max_position_embeddings, model.head_dim, "model")
    return Architecture(
        **own,
        fope_frequencies=kept,
        fope_by_head=model.fope_sep_head,
        vision=_vision(model),
        time_series=_time_series(model),
    )


def _refuse_keys_of_others(model: Model) -> None:
    for given in changed(model, "model"):
        key = given.partition("=")[0].removeprefix("model.")
        families = next((having for name, having in OWN.items() if f"{key}.".startswith(f"{name}.")), FAMILIES)
        if model.family not in families:
            raise InputError(
                f"{given} is for model.family={' or '.join(families)} and has no effect on model.family={model.family}; leave it "
                "out or choose another family."
            )


def _mrope_section(model: Model) -> tuple[int, ...]:
    if model.family != "qwen3_vl_moe":
        return ()
    lanes, section = model.head_dim // 2, tuple(model.mrope_section)
    if not section:
        side = round(lanes * 20 / 64)
        return (lanes - 2 * side, side, side)
    if len(section) != 3 or sum(section) != lanes or min(section) < 0:
        raise InputError(
            f"model.mrope_section={list(section)} must be three numbers that add up to model.head_dim / 2 = {lanes}; "
            "leave it out for Qwen3-VL's proportions."
        )
    return section


def _vision(model: Model) -> VisionArchitecture | None:
    if model.family == "qwen3_moe":
        return None
    deepstack = model.family == "qwen3_vl_moe"
    token = model.vision.image_token_id
    return fresh_tower(model.vision, model.hidden_size, model.num_hidden_layers, deepstack, token, model.vocab_size)


def _time_series(model: Model) -> TimeSeriesArchitecture | None:
    if model.time_series.use:
        return fresh_encoder(model.time_series, model.hidden_size, model.vocab_size, "model.time_series")
    for given in changed(model.time_series, "model.time_series"):
        raise InputError(f"{given} is the size of an encoder of time series; give model.time_series.use=true, or leave it out.")
    return None


def fresh_encoder(heard: TimeSeriesModel, hidden_size: int, vocab_size: int, key: str) -> TimeSeriesArchitecture:
    """An encoder of time series for a decoder of this width.

    Args:
        key: where the sizes come from.

    Raises:
        InputError: sizes that cannot be, or a token outside the vocabulary.
    """
    if heard.ts_token_id >= vocab_size:
        raise InputError(
            f"{key}.ts_token_id={heard.ts_token_id} is outside the vocabulary of {vocab_size:,} tokens; give that of the "
            "tokenizer's <TS_CONTEXT>."
        )
    sizes = {field.name: getattr(heard, field.name) for field in fields(TimeSeriesModel)}
    encoder = TimeSeriesArchitecture(**sizes, out_hidden_size=hidden_size)
    check_encoder(encoder, key)
    return encoder


def fresh_tower(
    seen: VisionModel,
    hidden_size: int,
    layers: int,
    deepstack: bool,
    token: int,
    vocab_size: int,
    key: str = "model.vision",
) -> VisionArchitecture:
    """A tower for a decoder of this width and depth, with DeepStack or without.

    Args:
        token: that holds a picture's place.
        key: where the sizes come from.

    Raises:
        InputError: sizes that cannot be, blocks for DeepStack where there is none, or a token outside the vocabulary.
    """
    if token >= vocab_size:
        raise InputError(
            f"{key}.image_token_id={token} is outside the vocabulary of {vocab_size:,} tokens; give that of the tokenizer's "
            "<|image_pad|>."
        )
    side = round(seen.num_position_embeddings**0.5)
    if side**2 != seen.num_position_embeddings:
        raise InputError(
            f"{key}.num_position_embeddings={seen.num_position_embeddings} is no square number, and positions lie in "
            f"a square; choose {side**2}."
        )
    if seen.hidden_size % (4 * seen.num_heads):
        raise InputError(
            f"{key}.hidden_size={seen.hidden_size} is not a multiple of 4 x {key}.num_heads={seen.num_heads}, and "
            "a quarter of each head turns with the row and with the column."
        )
    blocks = tuple(seen.deepstack_visual_indexes)
    if blocks and not deepstack:
        raise InputError(f"{key}.deepstack_visual_indexes={list(blocks)} is for Qwen3-VL's kind, not for this one; leave it out.")
    wrong = [block for block in blocks if not 0 <= block < seen.depth]
    if wrong or len(set(blocks)) < len(blocks) or len(blocks) > layers:
        raise InputError(
            f"{key}.deepstack_visual_indexes={list(blocks)} must name different blocks of 0 to {seen.depth - 1}, at most "
            f"one for each of the {layers} decoder layers."
        )
    return VisionArchitecture(
        depth=seen.depth,
        hidden_size=seen.hidden_size,
        intermediate_size=seen.intermediate_size,
        num_heads=seen.num_heads,
        in_channels=3,
        patch_size=seen.patch_size,
        temporal_patch_size=2,
        spatial_merge_size=seen.spatial_merge_size,
        out_hidden_size=hidden_size,
        num_position_embeddings=seen.num_position_embeddings,
        deepstack_visual_indexes=blocks,
        image_token_id=token,
    )
