"""Intern-S1: a Qwen3-MoE decoder under another prefix, with an InternViT and its projector.

transformers has no class for it and the parent's own code knows no groups, so a child's type is one that every engine refuses;
it is written and verified here, and not trained yet.
"""

from dataclasses import replace

from moexpand.upcycle.families.qwen3_vl_moe import vision_config
from moexpand.upcycle.family import Config, Family
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.towers import intern_vit


def _tower(config: Config, where: str) -> dict[str, Shape]:
    return intern_vit(
        vision_config(config, where),
        config["text_config"]["hidden_size"],
        float(config.get("downsample_ratio", 0.5)),
        "model.vision_tower.",
        "model.multi_modal_projector.",
    )


INTERNS1 = Family(
    model_type="interns1",
    class_name="InternS1ForConditionalGeneration",
    child="interns1_grouped",
    text="text_config",
    prefix="model.language_model.",
    carried=_tower,
)

FAMILIES = (
    INTERNS1,
    replace(INTERNS1, model_type="interns1_grouped", class_name="InternS1GroupedForConditionalGeneration"),
)

PRESETS = {
    "Intern-S1": {
        "architectures": ["InternS1ForConditionalGeneration"],
        "model_type": "interns1",
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
        "text_config": {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "max_position_embeddings": 40_960,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 1536,
            "norm_topk_prob": True,
            "num_attention_heads": 64,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 94,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1_000_000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 153_216,
        },
        "vision_config": {
            "attention_bias": False,
            "hidden_act": "gelu",
            "hidden_size": 3200,
            "image_size": [448, 448],
            "intermediate_size": 12_800,
            "model_type": "interns1_vision",
            "norm_type": "rms_norm",
            "num_attention_heads": 25,
            "num_channels": 3,
            "num_hidden_layers": 45,
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": True,
        },
    }
}
