"""Configuration of a Qwen3-MoE model whose router takes the best experts of every group."""

from transformers import Qwen3MoeConfig


class Qwen3MoeGroupedConfig(Qwen3MoeConfig):
    """Qwen3-MoE with `router_n_groups`: top-k is split evenly over that many groups of consecutive experts.

    `scoring_func` (softmax or sigmoid), `routed_scaling_factor` and `router_selection_bias` (a vector added to the scores for
    the choice alone) say how experts are chosen and weighted.
    """

    model_type = "qwen3_moe_grouped"

    router_n_groups: int = 1
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
    router_selection_bias: bool = False


__all__ = ["Qwen3MoeGroupedConfig"]
