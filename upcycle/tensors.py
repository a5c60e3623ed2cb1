"""Which tensors a checkpoint holds, by name and shape: as the model means them, and as a file stores them.

As the model means them every matrix of every expert is a tensor of its own ("logical"); files may stack them (`FUSED`), and store
the stacks transposed.
"""

from collections.abc import Callable, Iterable
from math import prod

from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.families import family_of
from moexpand.upcycle.family import EXPERT, FUSED, SCALE, SPLIT, Family, stack_of, with_scales
from moexpand.upcycle.safetensors_file import Shape

BLOCK = 128
"""Rows and columns of a block of an FP8 weight that share a scale."""


def _sizes(arch: Architecture) -> dict[str, int]:
    return {
        "V": arch.vocab_size,
        "H": arch.hidden_size,
        "Q": arch.num_attention_heads * arch.head_dim,
        "N": arch.num_key_value_heads * arch.head_dim,
        "D": arch.head_dim,
        "E": arch.num_experts,
        "I": arch.moe_intermediate_size,
        "F": arch.intermediate_size,
    }


def scale_shape(shape: Shape) -> Shape:
    """Shape of the scales of a block-FP8 matrix [out, in]."""
    return tuple(-(-size // BLOCK) for size in shape)


def matrix_shape(arch: Architecture, matrix: str) -> Shape:
    """Shape of a matrix of an expert (a key of `EXPERT`, or its scales), [out, in]."""
    sizes = _sizes(arch)
    shape = tuple(sizes[axis] for axis in EXPERT[matrix.removesuffix(SCALE)].split())
    return scale_shape(shape) if matrix.endswith(SCALE) else shape


def stacks(matrices: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The stacks of a fused file that hold these matrices of the experts (and scales), each with its matrices in order."""
    found: dict[str, tuple[str, ...]] = {}
    for matrix in matrices:
        found[stack_of(matrix)] = (*found.get(stack_of(matrix), ()), matrix)
    return found


def unit_shape(arch: Architecture, stack: tuple[str, ...], transposed: bool) -> Shape:
    """Shape of one expert's part of a stack, [out, in] or, transposed, [in, out]."""
    rows = sum(matrix_shape(arch, matrix)[0] for matrix in stack)
    columns = matrix_shape(arch, stack[0])[1]
    return (columns, rows) if transposed else (rows, columns)


def stored_tensors(
    arch: Architecture,
    layout: str = SPLIT,
    quantised: Callable[[str], bool] = lambda name: False,
    transposed: bool | None = None,
) -> dict[str, Shape]:
    """Name and shape of every tensor of a decoder, in the order of the model.

    Args:
        layout: how the experts are stored, `SPLIT` or `FUSED`.
        quantised: whether a tensor, or (by its name in `EXPERT`) a matrix of the experts, is block-FP8 and so has scales.
        transposed: whether stacks are [E, in, out]; None is the family's way.

    The head is absent when it shares the embedding's weights.
    """
    family, sizes = family_of(arch.model_type), _sizes(arch)
    transposed = family.transposed if transposed is None else transposed
    found: dict[str, Shape] = {}

    def add(name: str, axes: str) -> None:
        found[name] = tuple(sizes[axis] for axis in axes.split())
        if quantised(name):
            found[name + SCALE] = scale_shape(found[name])

    for name, axes in family.first.items():
        add(family.prefix + name, axes)
    moe_layers = set(arch.moe_layers)
    for layer in range(arch.num_hidden_layers):
        for name, axes in family.layer.items():
            add(family.layer_name(layer, name), axes)
        if layer in moe_layers:
            add(family.router_name(layer), "E H")
            if arch.selection_bias:
                add(family.selection_bias_name(layer), "E")
            found |= _expert_tensors(arch, family, layer, layout, quantised, transposed)
        else:
            for name, axes in family.dense.items():
                add(family.layer_name(layer, name), axes)
    for name, axes in family.last.items():
        add(family.prefix + name, axes)
    if not arch.tie_word_embeddings:
        add(family.head, "V H")
    return found


def _expert_tensors(
    arch: Architecture, family: Family, layer: int, layout: str, quantised: Callable[[str], bool], transposed: bool
) -> dict[str, Shape]:
    matrices = with_scales(EXPERT, quantised)
    if layout == FUSED:
        return {
            family.stack_name(layer, stack): (arch.num_experts, *unit_shape(arch, names, transposed))
            for stack, names in stacks(matrices).items()
        }
    return {
        family.expert_name(layer, expert, matrix): matrix_shape(arch, matrix)
        for expert in range(arch.num_experts)
        for matrix in matrices
    }


def expected_tensors(arch: Architecture) -> dict[str, Shape]:
    """Name and shape of every tensor of a decoder as the model means them, in the order of the model."""
    return stored_tensors(arch)


def parameters(shapes: dict[str, Shape]) -> int:
    """Number of parameters of tensors of these shapes."""
    return sum(prod(shape) for shape in shapes.values())
