"""A random Qwen3-VL-MoE that transformers builds, runs and saves."""

from typing import Any

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

EXPERTS, COPIES, TOP_K, HIDDEN, INNER, LAYERS, DENSE = 8, 4, 4, 48, 24, 3, 1
"""2 x INNER = HIDDEN: a stack of gates and ups is square, so that nothing but its axes' meaning tells the layouts apart."""

IMAGE, START, END = 100, 102, 103


def parent_model(seed: int = 0, dense: tuple[int, ...] = (DENSE,), **changes: Any) -> Qwen3VLMoeForConditionalGeneration:
    """A random parent in fp32 in which attention, routing, experts and images all matter to the logits.

    Args:
        dense: layers without experts.
        changes: keys of `text_config`, or of `vision_config` (as `vision={...}`), that are not as usual here.
    """
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "mlp_only_layers": list(dense), "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER, "rope_parameters": rope, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    } | {key: value for key, value in changes.items() if key != "vision"}  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    } | changes.get("vision", {})  # fmt: skip
    tokens = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": START, "vision_end_token_id": END}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **tokens))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                parameter.copy_(noise * (3.0 if name.endswith("mlp.gate.weight") else 1.0) / parameter.shape[-1] ** 0.5)
    return model.eval()
