"""Keys of a model that is trained from scratch."""

from dataclasses import dataclass

from moexpand.conf.fields import key, numbers, part

FAMILIES = ("qwen3_moe", "qwen3_vl_moe", "interns1_pro")


@dataclass
class VisionModel:
    """The vision tower of a fresh qwen3_vl_moe or interns1_pro; a checkpoint has its own in config.json."""

    depth: int = key(27, "blocks", within="[1, inf)")
    hidden_size: int = key(1152, "width of the tower", within="[1, inf)")
    intermediate_size: int = key(4304, "width inside a block's perceptron", within="[1, inf)")
    num_heads: int = key(16, "attention heads", within="[1, inf)")
    patch_size: int = key(16, "side of a patch in pixels", within="[1, inf)")
    spatial_merge_size: int = key(2, "so many patches, squared, become one token", within="[1, inf)")
    num_position_embeddings: int = key(2304, "learned positions, a square number", within="[1, inf)")
    deepstack_visual_indexes: list[int] = numbers("blocks whose features are added to the decoder's first layers (qwen3_vl_moe)")
    image_token_id: int = key(151_655, "the token that holds a picture's place: the tokenizer's <|image_pad|>", within="[0, inf)")


@dataclass
class TimeSeriesModel:
    """The time-series encoder of a fresh interns1_pro; a checkpoint's own config.json replaces it."""

    d_model: int = key(1024, "width of the encoder", within="[1, inf)")
    encoder_layers: int = key(17, "its layers", within="[1, inf)")
    encoder_attention_heads: int = key(16, "its attention heads", within="[1, inf)")
    encoder_ffn_dim: int = key(4096, "width inside a layer's perceptron", within="[1, inf)")
    max_source_positions: int = key(1500, "learned positions; later ones are 0", within="[1, inf)")
    num_mel_bins: int = key(80, "width of what the encoder takes", within="[1, inf)")
    ts_adapt_in_dim: int = key(256, "twice the width in which a patch's points are encoded", within="[4, inf)")
    ts_hidden_dim: int = key(1024, "width of what the projector takes", within="[1, inf)")
    patch_heads: int = key(8, "attention heads within a patch", within="[1, inf)")
    patch_ffn_dim: int = key(2048, "width inside the perceptron within a patch", within="[1, inf)")
    ts_token_id: int = key(151_685, "the token that holds a series' place: the tokenizer's <TS_CONTEXT>", within="[0, inf)")


@dataclass
class FreshTimeSeries(TimeSeriesModel):
    use: bool = key(False, "the model has a time-series encoder")


@dataclass
class Model:
    """Shape of a model trained from scratch; a checkpoint has its own in config.json."""

    family: str = key("qwen3_moe", "text alone, or with a vision tower as Qwen3-VL or Intern-S1-Pro has it", FAMILIES)
    vocab_size: int = key(8448, "rows of the embedding and of the head", within="[1, inf)")
    hidden_size: int = key(192, "width of the residual stream", within="[1, inf)")
    num_hidden_layers: int = key(4, "decoder layers", within="[1, inf)")
    num_attention_heads: int = key(4, "query heads", within="[1, inf)")
    num_key_value_heads: int = key(2, "key and value heads", within="[1, inf)")
    head_dim: int = key(48, "width of a head", within="[1, inf)")
    num_experts: int = key(128, "routed experts of a layer", within="[1, inf)")
    num_experts_per_tok: int = key(8, "experts that a token visits (top-k)", within="[1, inf)")
    router_n_groups: int = key(1, "groups that top-k is split over; 1 is plain top-k", within="[1, inf)")
    moe_intermediate_size: int = key(48, "width inside an expert", within="[1, inf)")
    norm_topk_prob: bool = key(True, "divide the chosen probabilities by their sum")
    scoring_func: str = key("softmax", "what makes scores of the router's logits", ("softmax", "sigmoid"))
    routed_scaling_factor: float = key(1.0, "multiplies the weights of the chosen experts", within="(0, inf)")
    rope_theta: float = key(1e6, "base of the rotary frequencies", within="(0, inf)")
    mrope_section: list[int] = numbers(
        "frequencies of time, height and width (qwen3_vl_moe); not given: in the proportion 24, 20, 20"
    )
    fope_init_factor: float = key(
        0.5, "width of the fresh tables of Fourier position embedding (interns1_pro)", within="[0, inf)"
    )
    fope_sep_head: bool = key(True, "a table for each key/value head, not one for all (interns1_pro)")
    max_position_embeddings: int = key(4096, "longest sequence the model is meant for", within="[1, inf)")
    rms_norm_eps: float = key(1e-6, "epsilon of the norms", within="(0, inf)")
    tie_word_embeddings: bool = key(False, "the head shares the embedding's weights")
    initializer_range: float = key(0.02, "standard deviation of fresh weights", within="(0, inf)")
    vision: VisionModel = part(VisionModel, "the vision tower, of families that have one")
    time_series: FreshTimeSeries = part(FreshTimeSeries, "the encoder of time series (interns1_pro)")
