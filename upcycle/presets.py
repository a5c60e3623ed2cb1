"""Shapes of published models and of their expansions, for `count` and for planning without a checkpoint."""

from dataclasses import replace

from moexpand.upcycle.architecture import Architecture

QWEN3_30B_A3B = Architecture(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    max_position_embeddings=40_960,
    dtype="bfloat16",
)
QWEN3_235B_A22B = replace(
    QWEN3_30B_A3B, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, moe_intermediate_size=1536
)


def _expanded(parent: Architecture) -> Architecture:
    return replace(parent, model_type="qwen3_moe_grouped", num_experts=4 * parent.num_experts, router_n_groups=8)


PRESETS = {
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
    "Qwen3-30B-A3B-x4": _expanded(QWEN3_30B_A3B),
    "Qwen3-235B-A22B": QWEN3_235B_A22B,
    "Qwen3-235B-A22B-x4": _expanded(QWEN3_235B_A22B),
}
"""By name; `-x4` is the expansion to 512 experts in 8 groups."""
