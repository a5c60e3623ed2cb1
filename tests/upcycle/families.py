"""Tiny parents of every family, written with torch and the safetensors library from the tables of names that are published.

A `Parent` remembers its tensors one expert and matrix at a time, whatever way its files hold them, so that `due` can say what
every tensor of a child has to be without any of the project's own reading.

Legend: E experts, S slots, H hidden, I inner width of an expert, F of a dense layer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.parents import make_child
from tests.upcycle.stacks import Tensors, stored

CODE = "raise RuntimeError('remote code ran')\n"
SIDE_FILES = {"tokenizer.json": '{"model": {}}', "chat_template.jinja": "{{ messages }}"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a decoder. 2 I = H: a stack of gates and ups is square, so that its shape says nothing about the order of its axes."""

    experts: int = 8
    top_k: int = 4
    groups: int = 1
    hidden: int = 32
    inner: int = 16
    dense_inner: int = 24
    layers: int = 3
    dense: tuple[int, ...] = (1,)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocab: int = 40
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A folder, and what is in it.

    Attributes:
        tensors: by the names of files that hold one tensor an expert and matrix, [out, in] each.
        transposed: whether stacks of this family are [E, in, out], as on the hub.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    transposed: bool = False

    @property
    def mlps(self) -> list[str]:
        """What the names of every layer with experts begin with."""
        routers = [name for name in self.tensors if name.endswith(".mlp.gate.weight")]
        return [name.removesuffix("gate.weight") for name in routers]


def due(parent: Parent, slot_to_parent: Sequence[Sequence[int]], fused: bool) -> Tensors:
    """Every tensor of a child without noise, as its files have to hold it."""
    tensors = dict(parent.tensors)
    for mlp in parent.mlps:
        row = slot_to_parent[int(mlp.split("layers.")[1].split(".")[0])]
        tensors[f"{mlp}gate.weight"] = parent.tensors[f"{mlp}gate.weight"][list(row)]
        for name in [name for name in tensors if name.startswith(f"{mlp}experts.")]:
            del tensors[name]
        for slot, expert in enumerate(row):
            own = f"{mlp}experts.{expert}."
            copies = {name: value for name, value in parent.tensors.items() if name.startswith(own)}
            tensors |= {name.replace(own, f"{mlp}experts.{slot}."): value for name, value in copies.items()}
    return stored(tensors, parent.transposed) if fused else tensors


def expanded(parent: Parent, folder: Path, **wishes: Any) -> tuple[Path, list[list[int]]]:
    """A child with 4 copies of every expert, in the parent's groups or in 4, and the parent of every slot of every layer.

    `random_balanced` maps every layer in its own way.
    """
    text = parent.config.get("text_config", parent.config)
    experts = text.get("num_experts", text.get("num_local_experts"))
    usual = {"num_experts": 4 * experts, "num_groups": 4, "placement": "random_balanced"}
    if text.get("router_n_groups", 1) > 1:
        usual |= {"num_groups": text["router_n_groups"], "placement": "block"}
    make_child(parent.folder, folder, **{**usual, **wishes})
    return folder, json.loads((folder / "expansion.json").read_text())["slot_to_parent"]


def write(
    folder: Path, files: Tensors, config: dict[str, Any], shards: int = 1, side_files: Iterable[tuple[str, str]] = ()
) -> Path:
    """Write a folder: tensors dealt to `shards` files by turns, an index where there are several, config.json, side files."""
    folder.mkdir(parents=True)
    names = sorted(files)
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: files[name] for name in names[number::shards]}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        places = {name: f"model-{at % shards + 1:05d}-of-{shards:05d}.safetensors" for at, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in [*SIDE_FILES.items(), *side_files]:
        (folder / name).write_text(text)
    return folder


@dataclass
class Draw:
    """Random tensors of one dtype."""

    dtype: torch.dtype = torch.bfloat16
    numbers: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, *shape: int, around: float = 0.0) -> torch.Tensor:
        width = shape[-1] ** 0.5 if len(shape) > 1 else 10
        return (around + torch.randn(shape, generator=self.numbers) / width).to(self.dtype)

    def named(self, prefix: str, shapes: dict[str, tuple[int, ...]]) -> Tensors:
        return {prefix + name: self(*shape, around=float("norm" in name)) for name, shape in shapes.items()}


def decoder(sizes: Sizes, prefix: str, draw: Draw) -> Tensors:
    """Every tensor of a decoder, one for each matrix of each expert."""
    H, I, F, D = sizes.hidden, sizes.inner, sizes.dense_inner, sizes.head_dim
    tensors = draw.named(prefix, {"embed_tokens.weight": (sizes.vocab, H), "norm.weight": (H,)})
    attention = {
        "self_attn.q_proj.weight": (sizes.heads * D, H), "self_attn.k_proj.weight": (sizes.kv_heads * D, H),
        "self_attn.v_proj.weight": (sizes.kv_heads * D, H), "self_attn.o_proj.weight": (H, sizes.heads * D),
        "self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,),
        "input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,),
    }  # fmt: skip
    for layer in range(sizes.layers):
        tensors |= draw.named(f"{prefix}layers.{layer}.", attention)
        mlp = f"{prefix}layers.{layer}.mlp."
        if layer in sizes.dense:
            tensors |= draw.named(mlp, {"gate_proj.weight": (F, H), "up_proj.weight": (F, H), "down_proj.weight": (H, F)})
            continue
        tensors[f"{mlp}gate.weight"] = draw(sizes.experts, H)
        for expert in range(sizes.experts):
            matrices = {"gate_proj.weight": (I, H), "up_proj.weight": (I, H), "down_proj.weight": (H, I)}
            tensors |= draw.named(f"{mlp}experts.{expert}.", matrices)
    return tensors if sizes.tie else tensors | {"lm_head.weight": draw(sizes.vocab, H)}


def text_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What config.json says of a decoder, in the form of the hub."""
    return {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": sizes.head_dim, "hidden_act": "silu",
        "hidden_size": sizes.hidden, "intermediate_size": sizes.dense_inner, "max_position_embeddings": 512,
        "mlp_only_layers": list(sizes.dense), "moe_intermediate_size": sizes.inner, "norm_topk_prob": True,
        "num_attention_heads": sizes.heads, "num_experts": sizes.experts, "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.layers, "num_key_value_heads": sizes.kv_heads, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1e6, "vocab_size": sizes.vocab,
    } | more  # fmt: skip


QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "in_channels": 3, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 9,
}  # fmt: skip
INTERN_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
    "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
    "use_mask_token": False, "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _layer_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def qwen_tower(hidden: int, mergers: Sequence[str], draw: Draw) -> Tensors:
    """`model.visual.*` of Qwen3-VL with `QWEN_VISION`; `mergers` besides the main one are those of DeepStack."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (16, 3, 2, 4, 4), "patch_embed.proj.bias": (16,)}
    shapes["pos_embed.weight"] = (9, 16)
    for block in (f"blocks.{number}." for number in range(2)):
        shapes |= _layer_norm(f"{block}norm1", 16) | _layer_norm(f"{block}norm2", 16)
        shapes |= _linear(f"{block}attn.qkv", 16, 48) | _linear(f"{block}attn.proj", 16, 16)
        shapes |= _linear(f"{block}mlp.linear_fc1", 16, 24) | _linear(f"{block}mlp.linear_fc2", 24, 16)
    for merger in ("merger", *mergers):
        shapes |= _layer_norm(f"{merger}.norm", 16 if merger == "merger" else 64)
        shapes |= _linear(f"{merger}.linear_fc1", 64, 64) | _linear(f"{merger}.linear_fc2", 64, hidden)
    return draw.named("model.visual.", shapes)


def intern_tower(hidden: int, draw: Draw) -> Tensors:
    """`model.vision_tower.*` and the projector of Intern-S1 with `INTERN_VISION`."""
    shapes: dict[str, tuple[int, ...]] = {"embeddings.cls_token": (1, 1, 16), "embeddings.position_embeddings": (1, 17, 16)}
    shapes |= {
        f"embeddings.patch_embeddings.projection.{name}": shape for name, shape in (("weight", (16, 3, 4, 4)), ("bias", (16,)))
    }
    for layer in (f"encoder.layer.{number}." for number in range(2)):
        shapes |= {f"{layer}lambda_1": (16,), f"{layer}lambda_2": (16,)}
        shapes |= {f"{layer}attention.{name}_proj.weight": (16, 16) for name in "qkv"}
        shapes |= _linear(f"{layer}attention.projection_layer", 16, 16)
        shapes |= {f"{layer}attention.q_norm.weight": (16,), f"{layer}attention.k_norm.weight": (16,)}
        shapes |= _linear(f"{layer}mlp.fc1", 16, 24) | _linear(f"{layer}mlp.fc2", 24, 16)
        shapes |= {f"{layer}layernorm_before.weight": (16,), f"{layer}layernorm_after.weight": (16,)}
    projector = _layer_norm("layer_norm", 64) | _linear("linear_1", 64, hidden) | _linear("linear_2", hidden, hidden)
    return draw.named("model.vision_tower.", shapes) | draw.named("model.multi_modal_projector.", projector)


@dataclass(frozen=True)
class Family:
    """What a family has besides a decoder.

    Attributes:
        config: config.json, but for what all families say alike.
        more: towers and the like.
        code: files of remote code.
    """

    config: Callable[[Sizes], dict[str, Any]]
    more: Callable[[Sizes, Draw], Tensors] = lambda sizes, draw: {}
    prefix: str = "model.language_model."
    transposed: bool = False
    code: tuple[str, ...] = ()


def make(
    family: str,
    folder: Path,
    *,
    fused: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    change: Callable[[Tensors], Tensors] = dict,
    **sizes: Any,
) -> Parent:
    """Write a random parent.

    Args:
        fused: stacks, as on the hub for Qwen3-VL: [E, H, 2 I] with the gates' columns first and [E, I, H].
        change: quantises the decoder's tensors, or damages them, before they are written.
        sizes: fields of `Sizes`.
    """
    kind = FAMILIES[family]
    shape, draw = Sizes(**(PRO if family == "interns1_pro" else {}) | sizes), Draw(dtype)
    tensors = change(decoder(shape, kind.prefix, draw)) | kind.more(shape, draw)
    config = kind.config(shape) | {"model_type": family, "tie_word_embeddings": shape.tie} | quantisation(tensors)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    code = [(name, CODE) for name in kind.code]
    write(folder, stored(tensors, kind.transposed) if fused else tensors, config, shards=3, side_files=code)
    return Parent(folder=folder, config=config, tensors=tensors, transposed=kind.transposed)


PRO = {"experts": 16, "top_k": 8, "groups": 8}


def _qwen3_moe(sizes: Sizes) -> dict[str, Any]:
    return {"architectures": ["Qwen3MoeForCausalLM"]} | text_config(sizes)


def _qwen3_vl_moe(sizes: Sizes) -> dict[str, Any]:
    text = text_config(sizes, model_type="qwen3_vl_moe_text")
    del text["norm_topk_prob"]  # the hub's configs have no such key
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"}
    vision = {"model_type": "qwen3_vl_moe", "out_hidden_size": sizes.hidden, "deepstack_visual_indexes": [0, 1]}
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": 30,
        "text_config": text,
        "vision_config": QWEN_VISION | vision,
    }


def _interns1(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["InternS1ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_interns1.InternS1Config", "AutoModel": "modeling_interns1.InternS1Model"},
        "downsample_ratio": 0.5,
        "text_config": text_config(sizes, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]),
        "vision_config": INTERN_VISION | {"model_type": "interns1_vision"},
    }


def _interns1_pro(sizes: Sizes) -> dict[str, Any]:
    fope = {"rope_type": "default", "fope_init_factor": 0.5, "fope_sep_head": True, "num_inv_freq": None}
    text = text_config(sizes, model_type="interns1_pro_text", router_n_groups=sizes.groups)
    return {
        "architectures": ["InternS1ProForConditionalGeneration"],
        "auto_map": {"AutoModelForCausalLM": "modeling_interns1_pro.InternS1ProForConditionalGeneration"},
        "text_config": text | {"rope_theta": 1000.0, "rope_scaling": fope},
        "vision_config": QWEN_VISION | {"model_type": "interns1_pro_vision", "out_hidden_size": sizes.hidden},
    }


def _interns1_pro_more(sizes: Sizes, draw: Draw) -> Tensors:
    """A tower without DeepStack, tables of FoPE in fp32, and a time-series encoder with tensors of many kinds."""
    # 1000 ** (-2 i / 8) > 2 pi / 512 for i = 0, 1, 2: three frequencies turn within the longest sequence.
    tables = {f"model.language_model.rotary_emb.{name}_coef": (sizes.kv_heads, 3, 3) for name in ("sin", "cos")}
    series = draw.named("model.time_series.", {"conv1.weight": (8, 3, 5), "conv1.bias": (8,)})
    series["model.time_series.norm.num_batches_tracked"] = torch.tensor(7)
    series["model.time_series.positions"] = Draw(torch.float32)(5, 8)
    return qwen_tower(sizes.hidden, (), draw) | Draw(torch.float32).named("", tables) | series


FAMILIES = {
    "qwen3_moe": Family(_qwen3_moe, prefix="model."),
    "qwen3_vl_moe": Family(
        _qwen3_vl_moe,
        lambda sizes, draw: qwen_tower(sizes.hidden, ["deepstack_merger_list.0", "deepstack_merger_list.1"], draw),
        transposed=True,
    ),
    "interns1": Family(
        _interns1,
        lambda sizes, draw: intern_tower(sizes.hidden, draw),
        code=("configuration_interns1.py", "modeling_interns1.py"),
    ),
    "interns1_pro": Family(_interns1_pro, _interns1_pro_more, code=("modeling_interns1_pro.py",)),
}


def quantisation(tensors: Tensors) -> dict[str, Any]:
    """`quantization_config` as released FP8 checkpoints have it, where there are FP8 tensors."""
    if not any(value.dtype == torch.float8_e4m3fn for value in tensors.values()):
        return {}
    rules = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    plain = [
        name.removesuffix(".weight") for name, value in tensors.items() if f"{name}_scale_inv" not in tensors and value.ndim > 1
    ]
    return {"quantization_config": rules | {"modules_to_not_convert": plain}}
