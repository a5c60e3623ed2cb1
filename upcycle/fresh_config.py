"""config.json of a model that was never a checkpoint, in the form of the hub."""

from dataclasses import asdict

from moexpand.upcycle.architecture import Architecture, TimeSeriesArchitecture, VisionArchitecture
from moexpand.upcycle.config_json import grouped_config, with_routing
from moexpand.upcycle.families import FAMILIES, family_of
from moexpand.upcycle.family import Config
from moexpand.upcycle.series_encoder import ACTIVATION


def architecture_config(arch: Architecture) -> Config:
    """config.json of a model of this architecture; a grouped one has its own model type and code, as a child."""
    parent = parent_type(arch.model_type)
    family = family_of(parent)
    config = _decoder(arch)
    if arch.vision is not None:
        text = {key: value for key, value in config.items() if key != "tie_word_embeddings"} | {"model_type": f"{parent}_text"}
        config = {family.text: text, "tie_word_embeddings": arch.tie_word_embeddings} | special_tokens(arch.vision.image_token_id)
        config["vision_config"] = vision_part(arch.vision, parent)
    if arch.time_series is not None:
        config |= series_part(arch.time_series)
    own = {"auto_map": family.auto_map} if family.auto_map else {}
    config = {"architectures": [family.class_name], "model_type": parent, **own} | config
    if arch.model_type == parent:
        return config
    return with_routing(grouped_config(config, arch.num_experts, arch.router_n_groups), arch)


def parent_type(model_type: str) -> str:
    """The type of the parents whose children are of this type; any other type as it is."""
    return next((name for name, family in FAMILIES.items() if family.child == model_type != name), model_type)


def _decoder(arch: Architecture) -> Config:
    config: Config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": arch.decoder_sparse_step,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "initializer_range": arch.initializer_range,
        "intermediate_size": arch.intermediate_size or arch.moe_intermediate_size * arch.num_experts_per_tok,
        "max_position_embeddings": arch.max_position_embeddings,
        "max_window_layers": arch.num_hidden_layers,
        "mlp_only_layers": list(arch.mlp_only_layers),
        "moe_intermediate_size": arch.moe_intermediate_size,
        "norm_topk_prob": arch.norm_topk_prob,
        "num_attention_heads": arch.num_attention_heads,
        "num_experts": arch.num_experts,
        "num_experts_per_tok": arch.num_experts_per_tok,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_key_value_heads": arch.num_key_value_heads,
        "output_router_logits": False,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_scaling": _rope_scaling(arch),
        "rope_theta": arch.rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "torch_dtype": arch.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": arch.vocab_size,
    }
    return config | ({"router_n_groups": arch.router_n_groups} if family_of(arch.model_type).child == arch.model_type else {})


def _rope_scaling(arch: Architecture) -> Config | None:
    if arch.mrope_section:
        return {"mrope_interleaved": True, "mrope_section": list(arch.mrope_section), "rope_type": "default"}
    if arch.fope_frequencies:
        return {
            "rope_type": "default",
            "fope_init_factor": arch.fope_init_factor,
            "fope_sep_head": arch.fope_by_head,
            "num_inv_freq": arch.fope_frequencies,
        }
    return None


def vision_part(vision: VisionArchitecture, model_type: str) -> Config:
    """`vision_config` of a tower."""
    tower = {key: value for key, value in asdict(vision).items() if key not in ("image_token_id", "deepstack_visual_indexes")}
    if model_type != "interns1_pro":
        tower["deepstack_visual_indexes"] = list(vision.deepstack_visual_indexes)
    return {**tower, "model_type": "interns1_pro_vision" if model_type == "interns1_pro" else model_type}


def series_part(encoder: TimeSeriesArchitecture) -> Config:
    """`ts_config` of an encoder of time series with all keys that LMDeploy reads, and its token."""
    sizes = asdict(encoder)
    token = sizes.pop("ts_token_id")
    fixed = {
        "model_type": "interns1_pro_time_series",
        "activation_function": ACTIVATION,
        "ts_adapt_out_dim": encoder.ts_hidden_dim,
        "scale_embedding": False,
        "pad_token_id": None,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    }
    return {"ts_config": sizes | fixed, "ts_token_id": token}


def special_tokens(image: int) -> Config:
    """The tokens around pictures, which stand in the same order in all of Qwen's tokenizers."""
    return {
        "vision_start_token_id": image - 3,
        "vision_end_token_id": image - 2,
        "image_token_id": image,
        "video_token_id": image + 1,
    }
