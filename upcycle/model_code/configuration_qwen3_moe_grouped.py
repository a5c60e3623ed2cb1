"""Configuration of a Qwen3-MoE model whose router takes the best experts of every group."""

from transformers import Qwen3MoeConfig


class Qwen3MoeGroupedConfig(Qwen3MoeConfig):
    """Qwen3-MoE with `router_n_groups`: top-k is split evenly over that many groups of consecutive experts."""

    model_type = "qwen3_moe_grouped"

    router_n_groups: int = 1


__all__ = ["Qwen3MoeGroupedConfig"]
