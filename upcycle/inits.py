"""How a copy may differ from its parent: noise on router rows and experts, and Drop-Upcycling.

Every function here is pure, and its random numbers are keyed by what they are for (seed, purpose, layer, slot, matrix). So the
bytes of a child do not depend on workers, hosts, order, the layout of the experts on disk, or the portions that a matrix is
handled in. Statistics are summed in float64: each row in an order of our own, rows by `math.fsum`, which no grouping changes. The
rest of the arithmetic is single additions, products, roots and roundings, which IEEE 754 fixes: the bytes are the same with every
numpy and on every processor.

Noise is relative: value * RMS * N(0, 1), with the RMS of the row for router rows and of the matrix for experts, added in fp32
(fp64 where the weight has it) and rounded once to the stored dtype. What the stored dtype would swallow is refused
(`check_visible`).

Drop-Upcycling (arXiv 2502.19261) draws a part of an expert's inner units anew, so that copies start different: for each matrix,
the values of these units come from N(mean, std) of the values that they replace. With `drop_shared` the units are the same in
all three matrices; without it each matrix has a set of its own, as in the paper's released code. Noise comes after it.

Legend: S slots of a layer, H hidden, I width inside an expert.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.random import generator, normals, raw_integers
from moexpand.upcycle.safetensors_file import dtype_code
from moexpand.upcycle.tiles import TILE, in_c_order

INNER_AXIS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
"""The axis of an expert's matrices that counts inner units: gate and up are [I, H], down is [H, I]."""

HALF_SPACINGS = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-25, "F64": 2.0**-54}
"""Half the distance between neighbouring numbers, relative, at its smallest; changes below it are rounded away."""

BLOCK = 1 << 18
"""Elements handled at a time: about 6 MB of working memory."""

LANES = 64
"""Partial sums of a row. Children cannot be proven any more when it changes."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """What happens to a copy's weights.

    Attributes:
        kind: `copy` or `drop` (Drop-Upcycling).
        drop_fraction: part of the I inner units that `drop` draws anew; at least one unit.
        drop_shared: the same units in gate, up and down.
        keep_first: the first copy of every parent stays exact; whoever calls these functions passes over it.
        router_noise, expert_noise: relative to the RMS of the row and of the matrix.
        seed: of all of it.
    """

    kind: str = "copy"
    drop_fraction: float = 0.5
    drop_shared: bool = True
    keep_first: bool = True
    router_noise: float = 0.0
    expert_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("copy", "drop"):
            raise InputError(f"init={self.kind} is not known; choose copy or drop.")
        if not 0 < self.drop_fraction <= 1:
            raise InputError(f"drop_fraction={self.drop_fraction} is not above 0 and at most 1.")
        for key in ("router_noise", "expert_noise"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{key}={getattr(self, key)} is not a finite number of at least 0.")


def changes_experts(init: Init) -> bool:
    """Whether experts of copies differ from their parents."""
    return init.kind == "drop" or init.expert_noise > 0


def check_visible(init: Init, router_dtype: str, expert_dtype: str) -> None:
    """An `InputError` when the stored dtypes (`BF16` or `bfloat16`) would swallow the noise or cannot take it at all.

    A relative change below half the spacing of the dtype's numbers moves hardly any weight: 1e-6 moves 0.03 % of bf16
    weights, 1e-4 2 %, 1e-3 23 %.
    """
    router, expert = dtype_code(router_dtype), dtype_code(expert_dtype)
    if changes_experts(init) and expert not in HALF_SPACINGS:
        raise InputError(
            f"Experts stored as {expert} can only be copied as they are; use init=copy and expert_noise=0, or a parent in "
            "bfloat16, float16 or float32."
        )
    for key, value, code in (("router_noise", init.router_noise, router), ("expert_noise", init.expert_noise, expert)):
        if value == 0:
            continue
        if code not in HALF_SPACINGS:
            raise InputError(f"{key}={value} cannot be added to weights stored as {code}; use {key}=0.")
        if value < HALF_SPACINGS[code]:
            way_out = ", or router_dtype=float32" if key == "router_noise" and HALF_SPACINGS["F32"] <= value else ""
            raise InputError(
                f"{key}={value:g} would be lost in weights stored as {code}, most of which would round back to what they were; "
                f"use at least {_rounded_up(HALF_SPACINGS[code])}{way_out}."
            )


def router_rows(rows: np.ndarray, init: Init, layer: int, exact: np.ndarray, dtype: Any) -> np.ndarray:
    """Router rows of a child's layer.

    Args:
        rows: [S, H], for every slot its parent's row, in the stored dtype.
        exact: bool [S], slots without noise.
        dtype: of the result; fp32 holds noise that bf16 would swallow.

    Returns:
        [S, H] of `dtype`, a new array.
    """
    result = rows.astype(dtype)
    if init.router_noise:
        for slot in np.flatnonzero(~exact).tolist():
            row = _wide(rows[slot : slot + 1])
            rms = _rms([row], row.size, f"router row {slot} of layer {layer}")
            result[slot] = _noisy(row, init.router_noise * rms, generator(init.seed, "router_noise", layer, slot))[0]
    return result


def expert_matrix(matrix: np.ndarray, name: str, init: Init, layer: int, slot: int) -> np.ndarray:
    """One matrix of one slot that is not exact: inner units drawn anew, then noise.

    Args:
        matrix: the parent's gate or up [I, H] or down [H, I], in the stored dtype, of any strides.
        name: `gate_proj.weight`, `up_proj.weight` or `down_proj.weight`.

    Returns:
        A new array of that shape and dtype, in C order; `matrix` itself when there is nothing to do.
    """
    if not changes_experts(init):
        return matrix
    result = in_c_order(matrix)
    what = f"{name} of layer {layer} for slot {slot}"
    if init.kind == "drop":
        units = _units(result, name, init, layer, slot)
        values = result.take(units, axis=INNER_AXIS[name])
        _draw_anew(values, generator(init.seed, "drop_values", layer, slot, name), what)
        _put(result, units, INNER_AXIS[name], values)
    if init.expert_noise:
        scale = init.expert_noise * _rms(map(_wide, _portions(result)), result.size, what)
        stream = generator(init.seed, "expert_noise", layer, slot, name)
        for portion in _portions(result):
            portion[...] = _noisy(_wide(portion), scale, stream)
    return result


def _units(matrix: np.ndarray, name: str, init: Init, layer: int, slot: int) -> np.ndarray:
    """The inner units to draw anew, ascending: those with the smallest keys."""
    inner = matrix.shape[INNER_AXIS[name]]
    subject = ("drop", layer, slot) if init.drop_shared else ("drop", layer, slot, name)
    keys = raw_integers(generator(init.seed, *subject), inner)
    return np.sort(np.argsort(keys, kind="stable")[: max(1, round(init.drop_fraction * inner))])


def _draw_anew(values: np.ndarray, stream: np.random.Generator, what: str) -> None:
    """Replace the values by N(mean, std) of themselves."""
    mean = _sum(map(_wide, _portions(values)), what) / values.size
    std = _rms((portion.astype(np.float64) - mean for portion in _portions(values)), values.size, what)
    for portion in _portions(values):
        portion[...] = _noisy(np.full_like(_wide(portion), mean), std, stream)


def _put(matrix: np.ndarray, units: np.ndarray, axis: int, values: np.ndarray) -> None:
    if axis == 0:
        matrix[units] = values
        return
    for top in range(0, len(matrix), TILE):  # numpy puts whole columns one by one, past the cache
        matrix[top : top + TILE, units] = values[top : top + TILE]


def _noisy(wide: np.ndarray, scale: float, stream: np.random.Generator) -> np.ndarray:
    """`wide` + scale * N(0, 1), in the precision of `wide`."""
    noise = normals(stream, *wide.shape).astype(wide.dtype, copy=False)
    noise *= wide.dtype.type(scale)
    noise += wide
    return noise


def _wide(values: np.ndarray) -> np.ndarray:
    """The values in fp32, or fp64 if they have it."""
    return values.astype(np.promote_types(values.dtype, np.float32))


def _portions(matrix: np.ndarray) -> list[np.ndarray]:
    """Views of some whole rows each."""
    step = max(1, BLOCK // matrix.shape[1])
    return [matrix[first : first + step] for first in range(0, len(matrix), step)]


def _rms(parts: Iterable[np.ndarray], count: int, what: str) -> float:
    return math.sqrt(_sum((np.multiply(part, part, dtype=np.float64) for part in parts), what) / count)


def _sum(parts: Iterable[np.ndarray], what: str) -> float:
    """Sum over all parts [rows, width], in float64."""
    try:
        total = math.fsum(chain.from_iterable(_row_sums(part.astype(np.float64, copy=False)).tolist() for part in parts))
    except (OverflowError, ValueError):
        total = math.nan
    if not math.isfinite(total):
        raise InputError(f"The parent's {what} holds numbers that are not finite, so that noise relative to them has no size.")
    return total


def _row_sums(values: np.ndarray) -> np.ndarray:
    """Sum of every row, [rows, width] to [rows]: `LANES` columns at a time, then halves onto halves.

    numpy leaves open in which order its own sums add, and has changed it: those of 40,000 columns differ between 2.0 and 2.4.
    """
    lanes = values[:, :LANES].copy()
    for first in range(LANES, values.shape[1], LANES):
        columns = values[:, first : first + LANES]
        lanes[:, : columns.shape[1]] += columns
    while lanes.shape[1] > 1:
        half = -(-lanes.shape[1] // 2)
        lanes[:, : lanes.shape[1] - half] += lanes[:, half:]
        lanes = lanes[:, :half]
    return lanes[:, 0]


def _rounded_up(value: float) -> str:
    """Three digits, not below `value`."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit) * unit:.3g}"
