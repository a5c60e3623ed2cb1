"""Which part of which Hugging Face tensor each local parameter holds: one table, read in both directions.

Megatron-Core keeps query, key and value of a key/value group together in one matrix and splits matrices over
tensor-parallel ranks; the experts of a rank lie stacked. `parts` says so piece by piece; `fill` copies a checkpoint in and
`collect` copies it out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from moexpand.parallel.shape import ModelShape
from moexpand.parallel.stage import Stage

Reader = Callable[[str, slice | None], torch.Tensor]
"""Returns the tensor of that name, or those of its rows alone."""

Order = Callable[[str], tuple[int, ...]]
"""Key of a name to sort by, stably."""

View = Callable[[torch.nn.Parameter], torch.Tensor]
"""What of a parameter is meant: its values, its gradient, ..."""


@dataclass(frozen=True)
class Part:
    """A block of a Hugging Face tensor and where it lies in this rank's memory.

    Attributes:
        name: the Hugging Face tensor.
        shape: its whole shape.
        local: a view of the local parameter, of the block's shape.
        rows, columns: the block in the whole tensor; None is all of them.
    """

    name: str
    shape: tuple[int, ...]
    local: torch.Tensor
    rows: slice | None = None
    columns: slice | None = None


def as_they_lie(name: str) -> tuple[int, ...]:
    """The order of the model."""
    return ()


def values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's data."""
    return parameter.data


def parts(stages: Sequence[Stage], shape: ModelShape, view: View = values) -> Iterator[Part]:
    """Every block that this rank holds, stage by stage in the order of the layers."""
    for stage in stages:
        yield from _stage_parts(stage, shape, view)


def _stage_parts(model: Stage, shape: ModelShape, view: View) -> Iterator[Part]:
    hidden, vocab = shape.hidden_size, shape.vocab_size
    tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    vocab_rows = slice(tp_rank * vocab // tp_size, (tp_rank + 1) * vocab // tp_size)
    embedding = f"{shape.prefix}embed_tokens.weight"
    if model.vision is not None:
        for name, parameter in model.vision.named_parameters():
            yield Part(f"model.visual.{name}", tuple(parameter.shape), view(parameter))
    if model.time_series is not None:
        for name, parameter in model.time_series.named_parameters():
            yield Part(f"model.time_series.{name}", tuple(parameter.shape), view(parameter))
    if model.pre_process:
        yield Part(embedding, (vocab, hidden), view(model.embedding.word_embeddings.weight), vocab_rows)
    if view is values:
        for name, table in model.rotary.state_dict().items():
            yield Part(f"{shape.prefix}rotary_emb.{name}", tuple(table.shape), table)
    for layer in model.decoder.layers:
        prefix = f"{shape.prefix}layers.{layer.layer_number - 1}"
        yield Part(f"{prefix}.input_layernorm.weight", (hidden,), view(layer.input_layernorm.weight))
        yield from _attention_parts(layer.self_attention, shape, f"{prefix}.self_attn", tp_rank, tp_size, view)
        yield Part(f"{prefix}.post_attention_layernorm.weight", (hidden,), view(layer.pre_mlp_layernorm.weight))
        yield Part(f"{prefix}.mlp.gate.weight", (shape.num_experts, hidden), view(layer.mlp.router.weight))
        if shape.selection_bias and view is values:
            yield Part(f"{prefix}.mlp.gate.e_score_correction_bias", (shape.num_experts,), layer.mlp.router.selection_bias)
        yield from _expert_parts(layer.mlp, shape, f"{prefix}.mlp.experts", view)
    if model.post_process:
        yield Part(f"{shape.prefix}norm.weight", (hidden,), view(model.decoder.final_layernorm.weight))
        if not shape.tie_word_embeddings:
            yield Part("lm_head.weight", (vocab, hidden), view(model.output_layer.weight), vocab_rows)
        elif not model.pre_process:  # the last stage's copy of a tied embedding
            yield Part(embedding, (vocab, hidden), view(model.output_layer.weight), vocab_rows)


def _attention_parts(attention: Any, shape: ModelShape, prefix: str, tp_rank: int, tp_size: int, view: View) -> Iterator[Part]:
    width, hidden, kv_heads = shape.head_dim, shape.hidden_size, shape.num_key_value_heads
    queries_per_group = shape.num_attention_heads // kv_heads
    local_groups = kv_heads // tp_size
    grouped = view(attention.linear_qkv.weight).view(local_groups, queries_per_group + 2, width, hidden)
    for name, heads, offset in (("q", queries_per_group, 0), ("k", 1, queries_per_group), ("v", 1, queries_per_group + 1)):
        for local in range(local_groups):
            group = tp_rank * local_groups + local
            block = grouped[local, offset : offset + heads].reshape(heads * width, hidden)
            rows = slice(group * heads * width, (group + 1) * heads * width)
            yield Part(f"{prefix}.{name}_proj.weight", (kv_heads * heads * width, hidden), block, rows)
    inputs = shape.num_attention_heads * width
    columns = slice(tp_rank * inputs // tp_size, (tp_rank + 1) * inputs // tp_size)
    yield Part(f"{prefix}.o_proj.weight", (hidden, inputs), view(attention.linear_proj.weight), None, columns)
    yield Part(f"{prefix}.q_norm.weight", (width,), view(attention.q_layernorm.weight))
    yield Part(f"{prefix}.k_norm.weight", (width,), view(attention.k_layernorm.weight))


def _expert_parts(moe: Any, shape: ModelShape, prefix: str, view: View) -> Iterator[Part]:
    inner, hidden, group = shape.moe_intermediate_size, shape.hidden_size, moe.experts.tensor_group
    gate_up, down = view(moe.experts.gate_up), view(moe.experts.down)
    own = slice(group.rank() * inner // group.size(), (group.rank() + 1) * inner // group.size())
    for local, expert in enumerate(moe.local_expert_indices):
        yield Part(f"{prefix}.{expert}.gate_proj.weight", (inner, hidden), gate_up[local, 0], own)
        yield Part(f"{prefix}.{expert}.up_proj.weight", (inner, hidden), gate_up[local, 1], own)
        yield Part(f"{prefix}.{expert}.down_proj.weight", (hidden, inner), down[local], None, own)


def fill(stages: Sequence[Stage], shape: ModelShape, read: Reader, order: Order = as_they_lie) -> set[str]:
    """Copy a checkpoint into this rank's parameters; each rank reads what it owns and no more.

    Args:
        order: in which tensors are read, by their names.

    Returns:
        The names that were read, for the caller to check that no tensor of the checkpoint was passed over.
    """
    names = set()
    for part in sorted(parts(stages, shape), key=lambda part: order(part.name)):
        tensor = read(part.name, part.rows)
        part.local.copy_(tensor if part.columns is None else tensor[:, part.columns])
        names.add(part.name)
    return names


def collect(stages: Sequence[Stage], shape: ModelShape, view: View = values) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors that lie whole on this rank, in a world without tensor parallelism.

    Tensors are views of the parameters where they lie in one piece, fresh copies otherwise.
    """
    gathered: torch.Tensor | None = None
    for part in parts(stages, shape, view):
        if part.local.shape == part.shape:
            yield part.name, part.local
            continue
        assert part.rows is not None
        if part.rows.start == 0:
            gathered = torch.empty(part.shape, dtype=part.local.dtype)
        assert gathered is not None
        gathered[part.rows] = part.local
        if part.rows.stop == part.shape[0]:
            yield part.name, gathered
