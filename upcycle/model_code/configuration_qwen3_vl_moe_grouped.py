"""Configuration of a Qwen3-VL-MoE model whose router takes the best experts of every group."""

from typing import Any, ClassVar

from transformers import Qwen3VLMoeConfig, Qwen3VLMoeTextConfig, Qwen3VLMoeVisionConfig


class Qwen3VLMoeGroupedTextConfig(Qwen3VLMoeTextConfig):
    """Qwen3-VL-MoE's decoder with `router_n_groups`: top-k is split evenly over that many groups of consecutive experts."""

    model_type = "qwen3_vl_moe_grouped_text"

    router_n_groups: int = 1


class Qwen3VLMoeGroupedConfig(Qwen3VLMoeConfig):
    """Qwen3-VL-MoE with a grouped router in its decoder."""

    model_type = "qwen3_vl_moe_grouped"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": Qwen3VLMoeVisionConfig,
        "text_config": Qwen3VLMoeGroupedTextConfig,
    }


__all__ = ["Qwen3VLMoeGroupedConfig", "Qwen3VLMoeGroupedTextConfig"]
