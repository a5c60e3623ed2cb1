"""Weights in and out of the engine: a Hugging Face folder, fresh ones, and back to a folder."""

from pathlib import Path
from typing import Any

import torch

from moexpand.base.errors import InputError
from moexpand.base.random import generator
from moexpand.parallel import ranks
from moexpand.parallel.engine import Engine
from moexpand.parallel.weights import Reader
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.folder import write_checkpoint
from moexpand.upcycle.logical import Weights
from moexpand.upcycle.tensors import expected_tensors

SELECTION_BIAS = ".e_score_correction_bias"
"""Ending of the names of selection biases."""


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
    """Fresh weights by Hugging Face name, the same for every layout: norms 1, matrices normal with `initializer_range`."""
    shapes = expected_tensors(architecture)

    def read(name: str, rows: slice | None) -> torch.Tensor:
        if name.endswith(SELECTION_BIAS):
            whole = torch.zeros(shapes[name])
        elif len(shapes[name]) == 1:
            whole = torch.ones(shapes[name])
        else:
            drawn = generator(seed, "fresh", name).standard_normal(shapes[name], dtype="float32")
            whole = torch.from_numpy(drawn * architecture.initializer_range)
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
) -> None:
    """Write the engine's weights as a Hugging Face folder; the engine must hold the whole model (a world of one rank).

    Args:
        config: config.json to write.
        side_files: folder whose tokenizer and other side files are copied.
        dtype: of the written tensors; selection biases are fp32.
    """
    tensors = dict(engine.tensors())
    expected = expected_tensors(architecture)
    assert tensors.keys() == expected.keys(), "the engine and the checkpoint family disagree about the model's tensors"

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name.endswith(SELECTION_BIAS) else dtype

    announced = {name: (str(dtype_of(name)), shape) for name, shape in expected.items()}
    write_checkpoint(target, config, announced, lambda name: tensors[name].to(dtype_of(name)), side_files, max_shard_size)
