"""What the engine is told: the shape of a model, the layout over ranks, the router's training rules, number formats."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class VisionShape:
    """A vision tower of Qwen3-VL's kind; the names are those of its Hugging Face config."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    image_token_id: int
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Blocks whose features are added to the outputs of the decoder's first layers, in order of the blocks (DeepStack)."""


@dataclass(frozen=True)
class TimeSeriesShape:
    """Intern-S1-Pro's time-series encoder; the names are those of its `ts_config`, where that has them."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    max_source_positions: int
    num_mel_bins: int
    ts_adapt_in_dim: int
    """Twice the width of a patch."""
    ts_hidden_dim: int
    out_hidden_size: int
    ts_token_id: int
    """The token that holds a feature's place."""
    patch_heads: int = 8
    patch_ffn_dim: int = 2048
    longest_patch: int = 20_000
    """Entries of the table of a point's places in its patch."""


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
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
    selection_bias: bool = False
    """The checkpoint has a bias that is added to the scores for the choice alone."""
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = ()
    """Frequencies of each axis (time, height, width) of interleaved MRoPE; empty where positions have one axis."""
    fope_frequencies: int = 0
    """Frequencies that Fourier position embedding keeps and mixes; 0 is plain rotary embedding."""
    fope_by_head: bool = False
    """FoPE has a table for each key/value head, not one for all."""
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    prefix: str = "model."
    """What the names of the decoder's tensors begin with in a checkpoint."""
    vision: VisionShape | None = None
    """The tower whose features take the places of `vision.image_token_id`."""
    time_series: TimeSeriesShape | None = None
    """The encoder whose features take the places of `time_series.ts_token_id`."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups. The world is TP x CP x PP x DP and, for the experts, ETP x EP x PP x expert-DP.

    Attributes:
        first_layers, last_layers: layers of the first and the last pipeline stage, where they have not as many as the others.
        interleave: parts of a pipeline stage that lie apart in the model (interleaved schedule); 1 is the plain schedule.
        overlap: communicate while computing, where Megatron-Core can.
    """

    tensor: int = 1
    pipeline: int = 1
    first_layers: int = 0
    last_layers: int = 0
    interleave: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    dispatcher: str = "alltoall"
    recompute: str = "none"
    overlap: bool = False


@dataclass(frozen=True)
class RouterRules:
    """How the router learns: its gradient (base/routing.py) and its auxiliary losses (parallel/balance.py).

    Attributes:
        gradient, temperature, normalised: see `moexpand.base.routing.route`.
        default_decay: decay a step of the moving averages of `default_vector`.
        freeze: the router's weights stay.
        balance_coefficient, group_coefficient, z_loss_coefficient: weights of the losses of each layer.
        scope: `micro` or `global`, see parallel/balance.py.
        layer_factors: multiplies the three coefficients in each decoder layer; empty is 1 everywhere.
        bias_rate: change of the selection bias a step, in units of a score; 0 leaves it.
    """

    gradient: str = "topk"
    temperature: float = 1.0
    normalised: bool = False
    default_decay: float = 0.9
    freeze: bool = False
    balance_coefficient: float = 0.0
    group_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0
    scope: str = "micro"
    layer_factors: tuple[float, ...] = ()
    bias_rate: float = 0.0
