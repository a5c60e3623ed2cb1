"""Matrices of single experts in a checkpoint's files, whatever the files' layout."""

from collections.abc import Sequence

import numpy as np

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import NUMPY, Checkpoint, read_range
from moexpand.upcycle.family import FUSED, stack_of
from moexpand.upcycle.jobs import Read
from moexpand.upcycle.safetensors_file import nbytes
from moexpand.upcycle.tensors import matrix_shape, stacks
from moexpand.upcycle.tiles import in_c_order


def matrix_range(checkpoint: Checkpoint, expert: int, matrices: Sequence[str]) -> tuple[int, int] | None:
    """Bytes [start, stop) of the stored tensor that hold these matrices of an expert one after the other, [out, in] each.

    Transposed stacks hold a whole unit of an expert as one run, and no single matrix of several.

    Returns:
        None when the file does not hold them as one run in this order.
    """
    sizes = {name: nbytes(dtype, matrix_shape(checkpoint.architecture, name)) for name, dtype in checkpoint.dtypes.items()}
    if checkpoint.experts_layout != FUSED:
        return (0, sizes[matrices[0]]) if len(matrices) == 1 else None
    stack = stacks(checkpoint.dtypes)[stack_of(matrices[0])]
    if checkpoint.transposed and tuple(matrices) != stack:
        return None
    unit = sum(sizes[name] for name in stack)
    start = expert * unit + sum(sizes[name] for name in stack[: stack.index(matrices[0])])
    return start, start + sum(sizes[name] for name in matrices)


def read_matrix(checkpoint: Checkpoint, layer: int, expert: int, matrix: str, read: Read | None = None) -> np.ndarray:
    """One matrix [out, in] of an expert (a key of `EXPERT`, or its scales); of a transposed stack it is a strided view.

    Args:
        read: brings the bytes, if not this function.
    """
    info = checkpoint.info(checkpoint.matrix_name(layer, expert, matrix))
    shape, dtype = matrix_shape(checkpoint.architecture, matrix), NUMPY[info.dtype]
    stack = stacks(checkpoint.dtypes)[stack_of(matrix)]
    found = matrix_range(checkpoint, expert, stack if checkpoint.transposed else (matrix,))
    assert found is not None
    data = np.frombuffer((read or read_range)(info.file, info.start + found[0], info.start + found[1]), dtype=dtype)
    if not checkpoint.transposed:
        return data.reshape(shape)
    before = sum(matrix_shape(checkpoint.architecture, name)[0] for name in stack[: stack.index(matrix)])
    return data.reshape(shape[1], -1)[:, before : before + shape[0]].T


def stored_unit(matrices: Sequence[np.ndarray], transposed: bool) -> np.ndarray:
    """Matrices [out, in] of an expert as a file's run of bytes holds them: side by side along `out`, perhaps transposed."""
    whole = matrices[0] if len(matrices) == 1 else np.concatenate(matrices)
    return in_c_order(whole.T) if transposed else np.ascontiguousarray(whole)


def check_conversion(checkpoint: Checkpoint, layout: str) -> None:
    """Refuse to stack matrices of two dtypes, and to stack or cut block-FP8 experts whose blocks would not stay whole."""
    if layout == FUSED:
        for matrices in stacks(checkpoint.dtypes).values():
            _check_one_dtype(checkpoint, matrices)
    inner = checkpoint.architecture.moe_intermediate_size
    scaled = len(checkpoint.dtypes) > 3
    if layout != checkpoint.experts_layout and scaled and inner % 128:
        raise InputError(
            f"{checkpoint.folder} has FP8 experts of width {inner}, which is no multiple of their blocks of 128; "
            "keep their layout with experts_layout=same."
        )


def _check_one_dtype(checkpoint: Checkpoint, matrices: Sequence[str]) -> None:
    layer = checkpoint.architecture.moe_layers[0]
    first, *others = [checkpoint.info(checkpoint.matrix_name(layer, 0, matrix)) for matrix in matrices]
    for info in others:
        if info.dtype != first.dtype:
            raise InputError(
                f"{info.file}: {info.name} is stored as {info.dtype} and {first.name} as {first.dtype}, which one stack cannot "
                "hold; keep them apart with experts_layout=split."
            )
