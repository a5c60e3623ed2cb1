"""Qwen3-VL-MoE: the decoder under another prefix, experts stacked and transposed, a vision tower with DeepStack."""

from dataclasses import replace
from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import VisionArchitecture
from moexpand.upcycle.family import FUSED, Config, Family
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.towers import qwen3_vl_architecture, qwen3_vl_tower


def vision_config(config: Config, where: str) -> dict[str, Any]:
    """The part of a config.json that describes the vision tower."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise InputError(f"{where} has no vision_config, which describes the tower of a {config['model_type']} model.")
    return vision


def vision(config: Config, where: str, deepstack: bool = True) -> VisionArchitecture:
    """The tower of this kind that a config.json describes, with DeepStack or without."""
    # transformers' default of the placeholder
    return qwen3_vl_architecture(vision_config(config, where), config.get("image_token_id", 151_655), deepstack)


def tower(config: Config, where: str, deepstack: bool = True) -> dict[str, Shape]:
    """Its tensors."""
    return qwen3_vl_tower(vision_config(config, where), "model.visual.", deepstack)


QWEN3_VL_MOE = Family(
    model_type="qwen3_vl_moe",
    class_name="Qwen3VLMoeForConditionalGeneration",
    child="qwen3_vl_moe_grouped",
    text="text_config",
    prefix="model.language_model.",
    experts_layout=FUSED,
    transposed=True,
    norm_topk_prob=True,  # the class has no such key and always normalises
    mrope_section=(24, 20, 20),
    vision=vision,
    carried=tower,
)

QWEN3_VL_MOE_GROUPED = replace(
    QWEN3_VL_MOE,
    model_type="qwen3_vl_moe_grouped",
    class_name="Qwen3VLMoeGroupedForConditionalGeneration",
    text_type="qwen3_vl_moe_grouped_text",
    auto_map={
        "AutoConfig": "configuration_qwen3_vl_moe_grouped.Qwen3VLMoeGroupedConfig",
        "AutoModel": "modeling_qwen3_vl_moe_grouped.Qwen3VLMoeGroupedModel",
        "AutoModelForImageTextToText": "modeling_qwen3_vl_moe_grouped.Qwen3VLMoeGroupedForConditionalGeneration",
    },
)

FAMILIES = (QWEN3_VL_MOE, QWEN3_VL_MOE_GROUPED)

_COMMON = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262_144,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5_000_000.0,
    "vocab_size": 151_936,
}


def _published(hidden: int, **text: int) -> Config:
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": 151_655,
        "tie_word_embeddings": False,
        "text_config": _COMMON | {"hidden_size": hidden} | text,
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "intermediate_size": 4304,
            "model_type": "qwen3_vl_moe",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


PRESETS = {
    "Qwen3-VL-30B-A3B": _published(
        2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32, num_hidden_layers=48
    ),
    "Qwen3-VL-235B-A22B": _published(
        4096, intermediate_size=12_288, moe_intermediate_size=1536, num_attention_heads=64, num_hidden_layers=94
    ),
}
