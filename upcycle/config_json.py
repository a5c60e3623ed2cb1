"""config.json, read in either of its two forms and written back.

Hub configs say `num_experts`, `rope_theta`, `torch_dtype`; transformers 5 writes `num_local_experts`,
`rope_parameters: {rope_theta, rope_type}`, `dtype`.
"""

from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import Architecture, check_architecture
from moexpand.upcycle.families import FAMILIES, family_of

Config = dict[str, Any]
"""config.json, parsed."""


def read_architecture(config: Config, where: str = "config.json") -> Architecture:
    """The shape that a config.json describes.

    Args:
        config: parsed config.json, of either form.
        where: path of the file, for messages.

    Raises:
        InputError: not a known Mixture-of-Experts model, a key is missing, or sizes contradict each other.
    """
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object.")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{where} describes {model_type!r}, not a known Mixture-of-Experts model; known are {', '.join(FAMILIES)}."
        )
    _refuse_variants(config, where)
    rope = {"rope_theta": config.get("rope_theta")} | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    heads = _size(config, "num_attention_heads", where)
    hidden = _size(config, "hidden_size", where)
    arch = Architecture(
        model_type=model_type,
        vocab_size=_size(config, "vocab_size", where),
        hidden_size=hidden,
        num_hidden_layers=_size(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads", where),
        head_dim=_size(config, "head_dim", where) if config.get("head_dim") is not None else hidden // heads,
        num_experts=_size(config, experts_key(config, where), where),
        num_experts_per_tok=_size(config, "num_experts_per_tok", where),
        router_n_groups=_size(config, "router_n_groups", where) if "router_n_groups" in config else 1,
        moe_intermediate_size=_size(config, "moe_intermediate_size", where),
        # transformers' defaults, for keys that a config may leave out
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        rope_theta=_number(rope, "rope_theta", 10_000.0, where),
        rope_type=str(rope.get("rope_type", rope.get("type", "default"))),
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window") else None,
        max_position_embeddings=int(_number(config, "max_position_embeddings", 32_768, where)),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6, where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=_number(config, "initializer_range", 0.02, where),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )
    check_architecture(arch, where)
    return arch


def experts_key(config: Config, where: str = "config.json") -> str:
    """Under which name this config keeps the number of experts."""
    hub, local = config.get("num_experts"), config.get("num_local_experts")
    if hub is not None and local is not None and hub != local:
        raise InputError(f"{where} says num_experts={hub} and num_local_experts={local}; which one holds?")
    return "num_local_experts" if hub is None and local is not None else "num_experts"


def architecture_config(arch: Architecture) -> Config:
    """config.json, in the form of the hub, of a fresh `qwen3_moe` model (without groups) or of a grouped child."""
    config: Config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "initializer_range": arch.initializer_range,
        "intermediate_size": arch.moe_intermediate_size * arch.num_experts_per_tok,
        "max_position_embeddings": arch.max_position_embeddings,
        "max_window_layers": arch.num_hidden_layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": arch.moe_intermediate_size,
        "norm_topk_prob": arch.norm_topk_prob,
        "num_attention_heads": arch.num_attention_heads,
        "num_experts": arch.num_experts,
        "num_experts_per_tok": arch.num_experts_per_tok,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_key_value_heads": arch.num_key_value_heads,
        "output_router_logits": False,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": arch.rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "torch_dtype": arch.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": arch.vocab_size,
    }
    return grouped_config(config, arch.num_experts, arch.router_n_groups) if arch.router_n_groups > 1 else config


def grouped_config(config: Config, num_experts: int, groups: int) -> Config:
    """config.json of a grouped child: its own model type and code, everything else as in the parent's `config`.

    Engines that know no groups would run such a model as plain top-k without a word; they refuse a type that they do not know.
    """
    child = family_of(family_of(config["model_type"]).child)
    changes = {
        "architectures": [child.class_name],
        "model_type": child.model_type,
        "auto_map": child.auto_map,
        experts_key(config): num_experts,
        "router_n_groups": groups,
    }
    return {**config, **changes}


def lmdeploy_config(config: Config) -> Config:
    """config.json of a grouped child under the parent's own model type, for LMDeploy, which honours `router_n_groups` there.

    Every other engine that knows `qwen3_moe` would ignore the groups and run plain top-k.
    """
    plain = next(family for family in FAMILIES.values() if family.child == config["model_type"] and not family.auto_map)
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


def _refuse_variants(config: Config, where: str) -> None:
    """Variants that the config class allows and no released Mixture-of-Experts parent of these types has."""
    for key, usual in (("attention_bias", False), ("decoder_sparse_step", 1), ("mlp_only_layers", []), ("hidden_act", "silu")):
        if config.get(key) not in (None, usual):
            raise InputError(f"{where} has {key}={config[key]!r}; only {usual!r} is supported.")
    if config.get("quantization_config"):
        raise InputError(f"{where} describes a quantised checkpoint; only unquantised weights are supported.")
