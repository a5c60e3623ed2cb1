"""How positions turn queries and keys: RoPE, interleaved MRoPE (Qwen3-VL) and FoPE (Intern-S1-Pro).

Every token of a packed stream brings its own position, or three of them (time, height, width). Tables of cosines and sines are
made once for a micro-batch and used by every layer.

Legend: T tokens of this rank's stream, N query or key heads, M key/value heads of this rank, W head width, F frequencies that
FoPE keeps.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from moexpand.parallel.shape import ModelShape


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines [T, 1 or M, W] of a stream's tokens, in the dtype of what they turn."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def turn(self, heads_TNW: torch.Tensor) -> torch.Tensor:
        """Queries or keys, turned: x cos + (-x2, x1) sin for the two halves x1, x2 of x; query heads follow their own group."""
        tokens, heads, width = heads_TNW.shape
        grouped = heads_TNW.reshape(tokens, self.cosines.shape[1], -1, width)
        first, second = grouped.chunk(2, dim=-1)
        crossed = torch.cat((-second, first), dim=-1)
        turned = grouped * self.cosines[:, :, None] + crossed * self.sines[:, :, None]
        return turned.reshape(tokens, heads, width)


class Rotary(torch.nn.Module):
    """Makes the tables from positions.

    FoPE (arXiv 2412.17739) keeps the frequencies that turn at least once within the longest sequence and mixes them:
    table = sines(F) @ coefficients, and the same for cosines; the pairs that are left get a constant 1 in both tables. The
    coefficients are part of a checkpoint and not trained.
    """

    frequencies: torch.Tensor
    axis: torch.Tensor
    sin_coef: torch.Tensor
    cos_coef: torch.Tensor

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).to(self.wide) / shape.head_dim
        self.register_buffer("frequencies", 1.0 / (shape.rope_theta**exponents), persistent=False)
        if shape.fope_frequencies:
            size = shape.fope_frequencies
            each = (shape.num_key_value_heads, size, size) if shape.fope_by_head else (size, size)
            for name in ("sin_coef", "cos_coef"):
                self.register_buffer(name, torch.zeros(each, dtype=self.wide))
        if shape.mrope_section:
            self.register_buffer("axis", axis_of(shape.mrope_section, shape.head_dim // 2), persistent=False)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> RotaryTables:
        """Tables of positions, int64 [T], or [3, T] for a model whose positions have three axes and are not all equal."""
        if self.shape.mrope_section:
            positions_TF = positions.expand(3, -1)[self.axis].T.to(self.wide)
        else:
            positions_TF = positions[:, None].to(self.wide)
        if self.shape.fope_frequencies:
            return self._mixed(positions_TF)
        angles_TF = positions_TF * self.frequencies
        return self._tables(angles_TF.cos()[:, None], angles_TF.sin()[:, None])

    def _mixed(self, positions_T1: torch.Tensor) -> RotaryTables:
        kept = self.shape.fope_frequencies
        angles_TF = positions_T1 * self.frequencies[:kept]
        tables = []
        for values_TF, coefficients in ((angles_TF.cos(), self.cos_coef), (angles_TF.sin(), self.sin_coef)):
            own_MFF = _own_heads(coefficients) if self.shape.fope_by_head else coefficients[None]
            mixed_TMF = torch.einsum("tF,mFf->tmf", values_TF, own_MFF)
            tables.append(torch.nn.functional.pad(mixed_TMF, (0, self.shape.head_dim // 2 - kept), value=1.0))
        return self._tables(*tables)

    def _tables(self, cosines: torch.Tensor, sines: torch.Tensor) -> RotaryTables:
        """Both halves of a head are turned by the same angles."""
        return RotaryTables(*(torch.cat((table, table), dim=-1).to(self.dtype) for table in (cosines, sines)))


def axis_of(section: tuple[int, ...], frequencies: int) -> torch.Tensor:
    """int64 [frequencies], which axis turns each: height at places 1, 4, ... and width at 2, 5, ... as far as `section` goes.

    Time has all others, so that every axis has slow and fast ones.
    """
    axis = torch.zeros(frequencies, dtype=torch.int64)
    for number, size in enumerate(section[1:], start=1):
        axis[number : 3 * size : 3] = number
    return axis


def _own_heads(tables: torch.Tensor) -> torch.Tensor:
    """The part of [key/value heads, ...] that belongs to this tensor-parallel rank."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return tables.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
