"""Intern-S1-Pro: a decoder that routes in groups itself, the tower of Qwen3-VL without DeepStack, FoPE tables, time series."""

from functools import partial

from moexpand.upcycle.families.qwen3_vl_moe import tower, vision
from moexpand.upcycle.family import Config, Family
from moexpand.upcycle.positions import fope_frequencies, rope_rules
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.series_encoder import ENCODER, encoder_architecture, encoder_tensors


def _fope_tables(config: Config, where: str) -> dict[str, Shape]:
    """The coefficients of Fourier position embedding, one square table a key/value head, or one for all."""
    text = config["text_config"]
    rules = rope_rules(text)
    heads, width = text["num_attention_heads"], text.get("head_dim")
    size = fope_frequencies(
        rules,
        float(rules.get("rope_theta", 10_000.0)),
        int(text.get("max_position_embeddings", 32_768)),
        width or text["hidden_size"] // heads,
        where,
    )
    if not size:
        return {}
    shape = (text["num_key_value_heads"], size, size) if rules.get("fope_sep_head") else (size, size)
    return {f"model.language_model.rotary_emb.{name}": shape for name in ("sin_coef", "cos_coef")}


def _carried(config: Config, where: str) -> dict[str, Shape]:
    return tower(config, where, deepstack=False) | encoder_tensors(config, where)


FAMILIES = (
    Family(
        model_type="interns1_pro",
        class_name="InternS1ProForConditionalGeneration",
        child="interns1_pro",
        text="text_config",
        prefix="model.language_model.",
        norm_topk_prob=True,
        vision=partial(vision, deepstack=False),
        time_series=encoder_architecture,
        carried=_carried,
        buffers=_fope_tables,
        free=(ENCODER,),
        auto_map={
            "AutoConfig": "configuration_interns1_pro_moexpand.InternS1ProConfig",
            "AutoModel": "modeling_interns1_pro_moexpand.InternS1ProModel",
            "AutoModelForImageTextToText": "modeling_interns1_pro_moexpand.InternS1ProForConditionalGeneration",
        },
    ),
)

PRESETS = {
    "Intern-S1-Pro": {
        "architectures": ["InternS1ProForConditionalGeneration"],
        "model_type": "interns1_pro",
        "tie_word_embeddings": False,
        "text_config": {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "max_position_embeddings": 262_144,
            "mlp_only_layers": [],
            "model_type": "interns1_pro_text",
            "moe_intermediate_size": 1536,
            "norm_topk_prob": True,
            "num_attention_heads": 64,
            "num_experts": 512,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 94,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None},
            "rope_theta": 5_000_000.0,
            "router_n_groups": 8,
            "vocab_size": 155_008,
        },
        "vision_config": {
            "depth": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024,
            "in_channels": 3,
            "intermediate_size": 4096,
            "model_type": "interns1_pro_vision",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
}
