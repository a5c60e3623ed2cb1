"""What a family of checkpoints is: the names and shapes of its tensors, in one declarative table.

All families that are known so far share the decoder of Qwen3-MoE and differ in the prefix of its names, in how files hold the
experts, and in what else they carry (vision towers and the like).

Legend of shapes: V vocabulary, H hidden, Q query heads x head_dim, N key/value heads x head_dim, D head_dim, E experts,
I intermediate width of an expert, F intermediate width of a dense layer. Linear weights are [out, in].
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from moexpand.upcycle.architecture import TimeSeriesArchitecture, VisionArchitecture
from moexpand.upcycle.safetensors_file import Shape

Config = dict[str, Any]
"""config.json, parsed."""

SPLIT, FUSED = "split", "fused"
"""How a file holds experts: one tensor an expert and matrix, or stacked over the experts."""

EXPERT = {"gate_proj.weight": "I H", "up_proj.weight": "I H", "down_proj.weight": "H I"}
"""Matrices of an expert: `{layer}mlp.experts.{e}.{matrix}` in split files."""

STACKS = {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)}
"""Tensors of fused files: `{layer}mlp.experts.{stack}`, the matrices of an expert side by side along their first axis."""

SCALE = "_scale_inv"
"""Ending of the scales of block-FP8 weights: one for every block of 128 x 128."""


def nothing(config: Config, where: str) -> dict[str, Shape]:
    """The tensors that a model of text alone has beside its decoder."""
    return {}


def no_tower(config: Config, where: str) -> VisionArchitecture | None:
    """A model of text alone, or with a tower that no forward pass here computes."""
    return None


def no_encoder(config: Config, where: str) -> TimeSeriesArchitecture | None:
    """A model without an encoder of time series."""
    return None


@dataclass(frozen=True)
class Family:
    """Names and shapes of a family's tensors.

    `first` and `last` names follow `prefix`, and stand before and after the layers in a file; `layer`, `dense` and `router` names
    follow `{prefix}layers.{n}.`.
    """

    model_type: str
    class_name: str
    child: str
    """Family of a grouped child; its own name for a family that knows groups."""
    text: str = ""
    """Key of config.json that holds the decoder's own config; empty: the top level."""
    text_type: str = ""
    """`model_type` of the decoder's own config, where it has one that must be written."""
    prefix: str = "model."
    first: dict[str, str] = field(default_factory=lambda: {"embed_tokens.weight": "V H"})
    last: dict[str, str] = field(default_factory=lambda: {"norm.weight": "H"})
    head: str = "lm_head.weight"
    layer: dict[str, str] = field(
        default_factory=lambda: {
            "input_layernorm.weight": "H",
            "self_attn.q_proj.weight": "Q H",
            "self_attn.k_proj.weight": "N H",
            "self_attn.v_proj.weight": "N H",
            "self_attn.o_proj.weight": "H Q",
            "self_attn.q_norm.weight": "D",
            "self_attn.k_norm.weight": "D",
            "post_attention_layernorm.weight": "H",
        }
    )
    dense: dict[str, str] = field(
        default_factory=lambda: {"mlp.gate_proj.weight": "F H", "mlp.up_proj.weight": "F H", "mlp.down_proj.weight": "H F"}
    )
    """Of a layer without experts."""
    router: str = "mlp.gate.weight"
    selection_bias: str = "mlp.gate.e_score_correction_bias"
    """Vector [E], in fp32, of models whose architecture has a selection bias."""
    own_routing: bool = False
    """The family's model code honours `scoring_func`, `routed_scaling_factor` and `router_selection_bias` of config.json."""
    experts_layout: str = SPLIT
    """Layout of the released files."""
    transposed: bool = False
    """Fused files of the hub hold [E, in, out] instead of [E, out, in]; `Checkpoint.transposed` says what a folder's hold."""
    norm_topk_prob: bool = False
    """What a config that does not say so means."""
    mrope_section: tuple[int, ...] = ()
    """The same, where positions have three axes."""
    vision: Callable[[Config, str], VisionArchitecture | None] = no_tower
    """The vision tower, where the engine computes it."""
    time_series: Callable[[Config, str], TimeSeriesArchitecture | None] = no_encoder
    """The encoder of time series."""
    carried: Callable[[Config, str], dict[str, Shape]] = nothing
    """Parameters beside the decoder, which an expansion copies: towers, projectors."""
    buffers: Callable[[Config, str], dict[str, Shape]] = nothing
    """Tensors that files of the family may hold and that are no parameters."""
    free: tuple[str, ...] = ()
    """Beginnings of names that are copied without a table of their shapes."""
    auto_map: dict[str, str] = field(default_factory=dict)
    """`auto_map` of config.json, for families whose model code we write (upcycle/model_code)."""

    def embedding_name(self) -> str:
        """Name of the embedding's rows [V, H]."""
        return f"{self.prefix}embed_tokens.weight"

    def layer_name(self, layer: int, name: str) -> str:
        """Name of a tensor of a layer."""
        return f"{self.prefix}layers.{layer}.{name}"

    def router_name(self, layer: int) -> str:
        """Name of the router's rows [E, H] of a layer."""
        return self.layer_name(layer, self.router)

    def selection_bias_name(self, layer: int) -> str:
        """Name of the router's selection bias [E] of a layer."""
        return self.layer_name(layer, self.selection_bias)

    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Name of a matrix of an expert in a split file."""
        return self.layer_name(layer, f"mlp.experts.{expert}.{matrix}")

    def stack_name(self, layer: int, stack: str) -> str:
        """Name of a stack of a fused file."""
        return self.layer_name(layer, f"mlp.experts.{stack}")


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: a part of the decoder, a tower (vision, time_series) or buffers."""
    for mark, part in (
        (".visual.", "vision"),
        (".vision_tower.", "vision"),
        (".multi_modal_projector.", "vision"),
        (".pos_encoder.pe", "buffers"),
        (".time_series.", "time_series"),
        (".rotary_emb.", "buffers"),
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.gate.", "router"),
        (".mlp.", "dense"),
        ("norm.", "norms"),
    ):
        if mark in name:
            return part
    return "other"


def stack_of(matrix: str) -> str:
    """The stack of fused files that holds a matrix of the experts, or its scales."""
    weight = matrix.removesuffix(SCALE)
    return next(stack for stack, matrices in STACKS.items() if weight in matrices) + matrix[len(weight) :]


def with_scales(matrices: Iterable[str], quantised: Callable[[str], bool]) -> list[str]:
    """Matrices of an expert, each that is stored as block-FP8 followed by its scales."""
    return [name for matrix in matrices for name in ((matrix, matrix + SCALE) if quantised(matrix) else (matrix,))]
