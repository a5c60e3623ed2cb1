"""What the engine is told: the shape of a model, the layout over ranks, the router's training rules, number formats."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3-MoE decoder; the names are those of its Hugging Face config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    router_n_groups: int = 1
    norm_topk_prob: bool = True
    rope_theta: float = 1e6
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups. The world is TP x CP x PP x DP and, for the experts, ETP x EP x PP x expert-DP."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    dispatcher: str = "alltoall"
    recompute: str = "none"


@dataclass(frozen=True)
class RouterRules:
    """How the router learns: its gradient (base/routing.py) and the weights of its auxiliary losses."""

    gradient: str = "topk"
    temperature: float = 1.0
    balance_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0
