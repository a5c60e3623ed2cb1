"""The shape of a Mixture-of-Experts decoder."""

from dataclasses import dataclass

from moexpand.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class VisionArchitecture:
    """A vision tower of Qwen3-VL's kind, also Intern-S1-Pro's; the names are those of `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    """A token of the decoder is made of so many patches, squared."""
    out_hidden_size: int
    """Width of the decoder that takes the tower's features."""
    num_position_embeddings: int
    hidden_act: str = "gelu_pytorch_tanh"
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Blocks whose features are added to the outputs of the decoder's first layers, in order of the blocks (DeepStack)."""
    image_token_id: int
    """The token that holds a feature's place."""


@dataclass(frozen=True, kw_only=True)
class TimeSeriesArchitecture:
    """Intern-S1-Pro's time-series encoder; the names are those of `ts_config`, but for the last ones, which it lacks."""

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
    """Width of the decoder that takes the encoder's features."""
    ts_token_id: int
    """The token that holds a feature's place."""
    patch_heads: int = 8
    patch_ffn_dim: int = 2048
    longest_patch: int = 20_000


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the decoder's shapes and its forward pass follow from."""

    model_type: str = "qwen3_moe"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    router_n_groups: int = 1
    moe_intermediate_size: int
    intermediate_size: int = 0
    """Width of the layers without experts; matters only where there are any."""
    decoder_sparse_step: int = 1
    """Every so many-th layer has experts ..."""
    mlp_only_layers: tuple[int, ...] = ()
    """... but these."""
    norm_topk_prob: bool = True
    scoring_func: str = "softmax"
    """What makes scores of the router's logits: `softmax` over all experts, or `sigmoid`."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights of the chosen experts."""
    selection_bias: bool = False
    """Every router has a bias that is added to the scores for the choice alone."""
    rope_theta: float = 1e6
    rope_type: str = "default"
    """`default` is plain rotary embedding; another name needs a forward pass that knows it."""
    mrope_section: tuple[int, ...] = ()
    """Frequencies of each axis (time, height, width) of interleaved MRoPE; empty where positions have one axis."""
    fope_frequencies: int = 0
    """Frequencies that Fourier position embedding keeps and mixes; 0 where the model has none."""
    fope_by_head: bool = False
    """FoPE has a table for each key/value head, not one for all."""
    fope_init_factor: float = 0.0
    """Width of fresh tables of FoPE (gain of Xavier's normal distribution, added to the identity)."""
    sliding_window: int | None = None
    """Width of the attention window, or None for full attention."""
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "float32"
    """Name of the torch dtype that the weights are meant for."""
    vision: VisionArchitecture | None = None
    """The tower, where there is one of a kind that is computed here."""
    time_series: TimeSeriesArchitecture | None = None
    """The encoder of time series, where there is one."""

    @property
    def routed_as_usual(self) -> bool:
        """Whether scores and weights are those that every engine computes for these models (groups aside)."""
        return self.scoring_func == "softmax" and self.routed_scaling_factor == 1.0 and not self.selection_bias

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers that have experts, by transformers' rule for Qwen3-MoE."""
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        ]


def check_architecture(arch: Architecture, where: str) -> None:
    """Refuse sizes that contradict each other, with an `InputError` that says which."""
    if arch.num_attention_heads % arch.num_key_value_heads:
        raise InputError(
            f"{where}: num_attention_heads={arch.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={arch.num_key_value_heads}."
        )
    if arch.num_experts % arch.router_n_groups or arch.num_experts_per_tok % arch.router_n_groups:
        raise InputError(
            f"{where}: {arch.num_experts} experts and top-{arch.num_experts_per_tok} are not both multiples of "
            f"router_n_groups={arch.router_n_groups}."
        )
    if arch.num_experts_per_tok > arch.num_experts:
        raise InputError(f"{where}: top-{arch.num_experts_per_tok} of {arch.num_experts} experts is impossible.")
    if arch.scoring_func not in ("softmax", "sigmoid"):
        raise InputError(f"{where}: scoring_func={arch.scoring_func!r} is neither softmax nor sigmoid.")
    if arch.time_series is not None and arch.time_series.ts_token_id >= arch.vocab_size:
        raise InputError(
            f"{where}: ts_token_id={arch.time_series.ts_token_id} is outside the vocabulary of {arch.vocab_size:,} tokens."
        )
    if not arch.moe_layers:
        raise InputError(f"{where}: mlp_only_layers and decoder_sparse_step leave no layer with experts.")
    if len(arch.moe_layers) < arch.num_hidden_layers and not arch.intermediate_size:
        raise InputError(f"{where} has layers without experts and no intermediate_size, which is their width.")
