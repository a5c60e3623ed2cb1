"""Qwen3-MoE: text alone, one tensor an expert; its children know groups through model code of their own."""

from dataclasses import replace

from moexpand.upcycle.family import Family

QWEN3_MOE = Family(model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", child="qwen3_moe_grouped")

QWEN3_MOE_GROUPED = replace(
    QWEN3_MOE,
    model_type="qwen3_moe_grouped",
    class_name="Qwen3MoeGroupedForCausalLM",
    own_routing=True,
    auto_map={
        "AutoConfig": "configuration_qwen3_moe_grouped.Qwen3MoeGroupedConfig",
        "AutoModel": "modeling_qwen3_moe_grouped.Qwen3MoeGroupedModel",
        "AutoModelForCausalLM": "modeling_qwen3_moe_grouped.Qwen3MoeGroupedForCausalLM",
    },
)

FAMILIES = (QWEN3_MOE, QWEN3_MOE_GROUPED)

_COMMON = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151_936,
}

PRESETS = {
    "Qwen3-30B-A3B": _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "Qwen3-235B-A22B": _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
}
