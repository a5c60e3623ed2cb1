"""The layouts of checkpoints that are read and written: one small table a family.

Legend of shapes: V vocabulary, H hidden, Q query heads x head_dim, N key/value heads x head_dim, D head_dim, E experts,
I intermediate width of an expert. Linear weights are [out, in].
"""

from dataclasses import dataclass, field, replace

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.safetensors_file import Shape


@dataclass(frozen=True)
class Family:
    """Names and shapes of a family's tensors.

    `layer` and `expert` names follow `{prefix}layers.{n}.` and `{prefix}layers.{n}.mlp.experts.{e}.`; `router` is one of `layer`.
    """

    model_type: str
    class_name: str
    prefix: str
    top: dict[str, str]
    layer: dict[str, str]
    expert: dict[str, str]
    router: str
    child: str
    """Family of a grouped child; its own name for a family that knows groups."""
    first: tuple[str, ...] = ("model.embed_tokens.weight",)
    """Names of `top` that stand before the layers in a file."""
    auto_map: dict[str, str] = field(default_factory=dict)
    """`auto_map` of config.json, for families whose model code travels with the checkpoint (upcycle/model_code)."""


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    prefix="model.",
    top={"model.embed_tokens.weight": "V H", "model.norm.weight": "H", "lm_head.weight": "V H"},
    layer={
        "input_layernorm.weight": "H",
        "self_attn.q_proj.weight": "Q H",
        "self_attn.k_proj.weight": "N H",
        "self_attn.v_proj.weight": "N H",
        "self_attn.o_proj.weight": "H Q",
        "self_attn.q_norm.weight": "D",
        "self_attn.k_norm.weight": "D",
        "post_attention_layernorm.weight": "H",
        "mlp.gate.weight": "E H",
    },
    expert={"gate_proj.weight": "I H", "up_proj.weight": "I H", "down_proj.weight": "H I"},
    router="mlp.gate.weight",
    child="qwen3_moe_grouped",
)

QWEN3_MOE_GROUPED = replace(
    QWEN3_MOE,
    model_type="qwen3_moe_grouped",
    class_name="Qwen3MoeGroupedForCausalLM",
    auto_map={
        "AutoConfig": "configuration_qwen3_moe_grouped.Qwen3MoeGroupedConfig",
        "AutoModel": "modeling_qwen3_moe_grouped.Qwen3MoeGroupedModel",
        "AutoModelForCausalLM": "modeling_qwen3_moe_grouped.Qwen3MoeGroupedForCausalLM",
    },
)

FAMILIES = {family.model_type: family for family in (QWEN3_MOE, QWEN3_MOE_GROUPED)}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`; an unknown one is an `InputError`."""
    if model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not a known Mixture-of-Experts family; known are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def router_name(family: Family, layer: int) -> str:
    """Name of the router's rows [E, H] of a layer."""
    return f"{family.prefix}layers.{layer}.{family.router}"


def expert_name(family: Family, layer: int, expert: int, matrix: str) -> str:
    """Name of a matrix (a key of `family.expert`) of an expert."""
    return f"{family.prefix}layers.{layer}.mlp.experts.{expert}.{matrix}"


def expected_tensors(arch: Architecture) -> dict[str, Shape]:
    """Shape of every tensor that a checkpoint of this shape holds, in the order of the model.

    `lm_head.weight` is absent when the head shares the embedding's weights.
    """
    family = family_of(arch.model_type)
    sizes = {
        "V": arch.vocab_size,
        "H": arch.hidden_size,
        "Q": arch.num_attention_heads * arch.head_dim,
        "N": arch.num_key_value_heads * arch.head_dim,
        "D": arch.head_dim,
        "E": arch.num_experts,
        "I": arch.moe_intermediate_size,
    }
    shapes: dict[str, dict[str, Shape]] = {
        part: {name: tuple(sizes[axis] for axis in axes.split()) for name, axes in getattr(family, part).items()}
        for part in ("top", "layer", "expert")
    }
    if arch.tie_word_embeddings:
        shapes["top"].pop("lm_head.weight")
    expected = {name: shapes["top"].pop(name) for name in family.first}
    for layer in range(arch.num_hidden_layers):
        expected.update({f"{family.prefix}layers.{layer}.{name}": shape for name, shape in shapes["layer"].items()})
        for expert in range(arch.num_experts):
            expected.update({expert_name(family, layer, expert, name): shape for name, shape in shapes["expert"].items()})
    return expected | shapes["top"]


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: embedding, head, attention, router, experts or norms."""
    for mark, part in (
        ("embed_tokens.", "embedding"),
        ("lm_head.", "head"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.gate.", "router"),
        ("norm.", "norms"),
    ):
        if mark in name:
            return part
    raise InputError(f"{name} belongs to no known part of a model.")
