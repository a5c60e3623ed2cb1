"""Weights in and out of the engine: a Hugging Face folder, fresh ones, and back to a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moexpand.base.block_fp8 import WEIGHTS, quantise
from moexpand.base.errors import InputError
from moexpand.parallel import ranks
from moexpand.parallel.engine import Engine
from moexpand.parallel.weights import Reader
from moexpand.upcycle import fp8_rules
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.families import family_of
from moexpand.upcycle.family import SCALE, SPLIT, STACKS, Family, with_scales
from moexpand.upcycle.folder import write_checkpoint
from moexpand.upcycle.fresh_config import architecture_config
from moexpand.upcycle.fresh_weights import SELECTION_BIAS, fresh_tensor
from moexpand.upcycle.logical import Weights, expert_of, model_tensors
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.tensors import scale_shape, stored_tensors

Announced = dict[str, tuple[str, Shape]]
"""Dtype and shape of tensors that are to be written."""

Producer = Callable[[str], torch.Tensor]


def load(engine: Engine, weights: Weights) -> None:
    """Fill the engine; every rank reads what it owns, and all together must have read every tensor.

    A selection bias that the run takes up, and the checkpoint does not have, begins at zero.
    """
    names = set(weights.names)

    def read_torch(name: str, rows: slice | None) -> torch.Tensor:
        if name.endswith(SELECTION_BIAS) and name not in names:
            return torch.zeros(engine.shape.num_experts)
        return weights.read_torch(name, rows)

    read = set().union(*ranks.gather(engine.fill(read_torch, weights.order)))
    for name in weights.names:
        if name not in read:
            raise InputError(f"{weights.folder} holds {name}, which the engine has no place for.")


def fresh(architecture: Architecture, seed: int) -> Reader:
    """Fresh weights by Hugging Face name, the same for every layout; see `fresh_tensor`."""
    shapes = model_tensors(architecture, architecture_config(architecture))

    def read(name: str, rows: slice | None) -> torch.Tensor:
        drawn = fresh_tensor(name, shapes[name], seed, architecture.initializer_range, architecture.fope_init_factor)
        whole = torch.from_numpy(drawn)
        return whole if rows is None else whole[rows]

    return read


def write(
    engine: Engine,
    architecture: Architecture,
    config: dict[str, Any],
    target: Path,
    side_files: Path | None,
    max_shard_size: str,
    dtype: torch.dtype,
    fp8: bool = False,
) -> None:
    """Write the engine's weights as a Hugging Face folder; the engine must hold the whole model (a world of one rank).

    Args:
        config: config.json to write; with `fp8` it is told of that.
        side_files: folder whose tokenizer and other side files are copied.
        dtype: of the written tensors; selection biases are fp32.
        fp8: the decoder's linears are written in block-FP8 with their scales, experts one by one (fp8_rules.py).
    """
    tensors = dict(engine.tensors())
    family = family_of(architecture.model_type)
    expected = model_tensors(architecture, config)
    assert tensors.keys() == expected.keys(), "the engine and the checkpoint family disagree about the model's tensors"
    stored = stored_tensors(architecture, SPLIT if fp8 else family.experts_layout)
    stored |= {name: shape for name, shape in expected.items() if name not in stored and expert_of(name) is None}

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.endswith(SELECTION_BIAS) or ".rotary_emb." in name else dtype

    def produce(name: str) -> torch.Tensor:
        whole = tensors[name] if name in tensors else _stacked(tensors, name, architecture, family)
        return whole.to(dtype_of(name))

    announced = {name: (str(dtype_of(name)), shape) for name, shape in stored.items()}
    content: Producer = produce
    if fp8:
        config = config | {"quantization_config": fp8_rules.quantization_config(stored)}
        announced, content = _in_fp8(announced, produce)
    write_checkpoint(target, config, announced, content, side_files, max_shard_size)


def _in_fp8(announced: Announced, produce: Producer) -> tuple[Announced, Producer]:
    """The same tensors with the decoder's linears in block-FP8, each followed by its scales."""
    scales: dict[str, torch.Tensor] = {}

    def told(name: str) -> tuple[str, Shape]:
        if name.endswith(SCALE):
            return fp8_rules.SCALES, scale_shape(announced[name.removesuffix(SCALE)][1])
        dtype, shape = announced[name]
        return (fp8_rules.WEIGHT if fp8_rules.quantised(name) else dtype), shape

    def rounded(name: str) -> torch.Tensor:
        if name in scales:  # it is asked for right after its weight
            return scales.pop(name)
        whole = produce(name)
        if not fp8_rules.quantised(name):
            return whole
        weight, scales[name + SCALE] = quantise(whole, WEIGHTS)
        return weight

    return {name: told(name) for name in with_scales(announced, fp8_rules.quantised)}, rounded


def _stacked(tensors: dict[str, torch.Tensor], name: str, architecture: Architecture, family: Family) -> torch.Tensor:
    """A stack of the experts' matrices, [E, out, in] or, transposed, [E, in, out]."""
    prefix, _, stack = name.rpartition(".")
    whole: torch.Tensor | None = None
    for expert in range(architecture.num_experts):
        unit = torch.cat([tensors[f"{prefix}.{expert}.{matrix}"] for matrix in STACKS[stack]])
        unit = unit.T if family.transposed else unit
        if whole is None:
            whole = unit.new_empty(architecture.num_experts, *unit.shape)
        whole[expert] = unit
    assert whole is not None
    return whole
