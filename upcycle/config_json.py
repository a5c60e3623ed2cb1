"""config.json, read in either of its two forms and written back.

Hub configs say `num_experts`, `rope_theta`, `torch_dtype`; transformers 5 writes `num_local_experts`,
`rope_parameters: {rope_theta, rope_type}`, `dtype`. Models of more than text keep the decoder's own config under `text_config`.
"""

from collections.abc import Mapping
from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import Architecture, check_architecture
from moexpand.upcycle.families import FAMILIES, family_of
from moexpand.upcycle.family import Config, Family, no_tower
from moexpand.upcycle.positions import fope_frequencies, mrope_section, rope_rules
from moexpand.upcycle.tensors import BLOCK

ROUTING: Config = {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "router_selection_bias": False}
"""Keys of config.json that say how a router of ours scores, and what their absence means."""


def text_config(config: Config, family: Family, where: str = "config.json") -> Config:
    """The part of a config.json that describes the decoder."""
    text = config.get(family.text) if family.text else config
    if not isinstance(text, dict):
        raise InputError(f"{where} has no {family.text}, which describes the decoder of a {family.model_type} model.")
    return text


def read_architecture(config: Config, where: str = "config.json") -> Architecture:
    """The shape of the decoder that a config.json describes.

    Args:
        config: parsed config.json, of either form.
        where: path of the file, for messages.

    Raises:
        InputError: not a known Mixture-of-Experts model, a key is missing, or sizes contradict each other.
    """
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object.")
    family = family_of(config.get("model_type"), where)
    text = text_config(config, family, where)
    _refuse_variants(text, where)
    _refuse_routing(text, family, where)
    _check_quantisation(config, where)
    rope = rope_rules(text)
    heads = _size(text, "num_attention_heads", where)
    hidden = _size(text, "hidden_size", where)
    head_dim = _size(text, "head_dim", where) if text.get("head_dim") is not None else hidden // heads
    theta, positions = _number(rope, "rope_theta", 10_000.0, where), int(_number(text, "max_position_embeddings", 32_768, where))
    arch = Architecture(
        model_type=family.model_type,
        vocab_size=_size(text, "vocab_size", where),
        hidden_size=hidden,
        num_hidden_layers=_size(text, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_size(text, "num_key_value_heads", where),
        head_dim=head_dim,
        num_experts=_size(text, experts_key(text, where), where),
        num_experts_per_tok=_size(text, "num_experts_per_tok", where),
        router_n_groups=_size(text, "router_n_groups", where) if text.get("router_n_groups") is not None else 1,
        moe_intermediate_size=_size(text, "moe_intermediate_size", where),
        intermediate_size=_size(text, "intermediate_size", where) if text.get("intermediate_size") is not None else 0,
        decoder_sparse_step=_size(text, "decoder_sparse_step", where) if text.get("decoder_sparse_step") is not None else 1,
        mlp_only_layers=_layers(text, where),
        # transformers' defaults, for keys that a config may leave out
        norm_topk_prob=bool(text.get("norm_topk_prob", family.norm_topk_prob)),
        scoring_func=str(text.get("scoring_func") or "softmax"),
        routed_scaling_factor=_number(text, "routed_scaling_factor", 1.0, where),
        selection_bias=bool(text.get("router_selection_bias", False)),
        rope_theta=theta,
        rope_type=str(rope.get("rope_type", rope.get("type", "default"))),
        mrope_section=mrope_section(rope, family.mrope_section, where),
        fope_frequencies=fope_frequencies(rope, theta, positions, head_dim, where),
        fope_by_head=bool(rope.get("fope_sep_head", False)),
        fope_init_factor=float(rope.get("fope_init_factor") or 0.0),
        sliding_window=text.get("sliding_window") if text.get("use_sliding_window") else None,
        max_position_embeddings=positions,
        rms_norm_eps=_number(text, "rms_norm_eps", 1e-6, where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=_number(text, "initializer_range", 0.02, where),
        dtype=_dtype(config, text),
        vision=family.vision(config, where),
        time_series=family.time_series(config, where),
    )
    check_architecture(arch, where)
    if not arch.norm_topk_prob and family.vision is not no_tower:
        raise InputError(f"{where} has norm_topk_prob=false, and models of type {family.model_type} always normalise.")
    return arch


def _dtype(config: Config, text: Config) -> str:
    named = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), "float32")
    return str(named).removeprefix("torch.")


def experts_key(text: Config, where: str = "config.json") -> str:
    """Under which name a decoder's config keeps the number of experts."""
    hub, local = text.get("num_experts"), text.get("num_local_experts")
    if hub is not None and local is not None and hub != local:
        raise InputError(f"{where} says num_experts={hub} and num_local_experts={local}; which one holds?")
    return "num_local_experts" if hub is None and local is not None else "num_experts"


def with_routing(config: Config, arch: Architecture) -> Config:
    """config.json of a grouped model with the architecture's way of routing, as far as it is not the usual one."""
    said = (arch.scoring_func, arch.routed_scaling_factor, arch.selection_bias)
    changed = {key: value for (key, usual), value in zip(ROUTING.items(), said, strict=True) if value != usual}
    return {key: value for key, value in config.items() if key not in ROUTING} | changed


def grouped_config(config: Config, num_experts: int, groups: int) -> Config:
    """config.json of a grouped child: its own model type and code, everything else as in the parent's `config`.

    Engines that know no groups would run such a model as plain top-k without a word; they refuse a type that they do not know.
    A family that knows groups itself keeps its type and its code. A parent's own remote code is not named by a child of another
    type, as it would do just that.
    """
    family = family_of(config["model_type"])
    child = family_of(family.child)
    text = text_config(config, family)
    changed = {**text, experts_key(text): num_experts, "router_n_groups": groups}
    if family.text:
        if child.text_type:
            changed["model_type"] = child.text_type
        changed = {**config, family.text: changed}
    if child is family:
        return changed
    kept = {key: value for key, value in changed.items() if key != "auto_map"}
    own = {"auto_map": child.auto_map} if child.auto_map else {}
    return {**kept, "architectures": [child.class_name], "model_type": child.model_type, **own}


def with_vocabulary(config: Config, size: int, moved: Mapping[int, int]) -> Config:
    """config.json of a model whose tokens got other ids: `moved` has the new id of every old one that is kept.

    Raises:
        InputError: a key names a token that the new vocabulary lacks.
    """
    family, arch = family_of(config["model_type"]), read_architecture(config)
    if arch.vision is not None:  # what the config means where it is silent
        config = {"image_token_id": arch.vision.image_token_id} | config
    if arch.time_series is not None:
        config = {"ts_token_id": arch.time_series.ts_token_id} | config
    changed = {key: _moved_ids(key, value, moved) for key, value in config.items()}
    text = text_config(changed, family)
    text = {key: _moved_ids(key, value, moved) for key, value in text.items()} if family.text else text
    text = {**text, "vocab_size": size}
    return {**changed, family.text: text} if family.text else text


def _moved_ids(key: str, value: Any, moved: Mapping[int, int]) -> Any:
    """The value of a `..._token_id` key in the new vocabulary; other keys' as it is."""
    if not key.endswith("_token_id") or value is None:
        return value
    ids = value if isinstance(value, list) else [value]
    for number in ids:
        if number not in moved:
            raise InputError(
                f"config.json says {key}={value}, and the child's vocabulary has no such token; give a tokenizer that has it, or "
                "correct the parent's config.json."
            )
    return [moved[number] for number in ids] if isinstance(value, list) else moved[value]


def lmdeploy_config(config: Config) -> Config:
    """config.json of a grouped child under the parent's own model type, for LMDeploy, which honours `router_n_groups` there.

    Every other engine that knows `qwen3_moe` would ignore the groups and run plain top-k.
    """
    plain = next(family for name, family in FAMILIES.items() if family.child == config["model_type"] != name)
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return kept | {"architectures": [plain.class_name], "model_type": plain.model_type}


def _size(config: Config, key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{where} has {key}={value!r}; a whole number of at least 1 is needed.")
    return value


def _number(config: Config, key: str, default: float, where: str) -> float:
    value = default if config.get(key) is None else config[key]
    if type(value) not in (int, float) or value <= 0:
        raise InputError(f"{where} has {key}={value!r}; a number above 0 is needed.")
    return float(value)


def _layers(config: Config, where: str) -> tuple[int, ...]:
    value = config.get("mlp_only_layers") or []
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        raise InputError(f"{where} has mlp_only_layers={value!r}; a list of layers' numbers is needed.")
    return tuple(value)


def _refuse_variants(config: Config, where: str) -> None:
    """Variants that the config class allows and no released Mixture-of-Experts parent of these types has."""
    for key, usual in (("attention_bias", False), ("hidden_act", "silu")):
        if config.get(key) not in (None, usual):
            raise InputError(f"{where} has {key}={config[key]!r}; only {usual!r} is supported.")


def _refuse_routing(config: Config, family: Family, where: str) -> None:
    """Routing that the family's model code would pass over in silence."""
    for key, usual in ROUTING.items():
        if not family.own_routing and config.get(key) not in (None, usual):
            raise InputError(f"{where} has {key}={config[key]!r}, which model_type={family.model_type} does not honour.")


def _check_quantisation(config: Config, where: str) -> None:
    """Block-FP8 is carried from parent to child byte for byte; other formats are refused."""
    rules: Any = config.get("quantization_config")
    if not rules:
        return
    if not isinstance(rules, dict) or rules.get("quant_method") != "fp8" or rules.get("weight_block_size") != [BLOCK, BLOCK]:
        raise InputError(
            f"{where} describes a quantised checkpoint; of these only fp8 with weight_block_size [{BLOCK}, {BLOCK}] is supported."
        )
