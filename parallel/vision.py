"""Qwen3-VL's vision tower, which Intern-S1-Pro shares: patches of pictures of any size to features of the decoder's width.

Modules and parameters have the names that they have in a checkpoint behind `model.visual.`. The whole tower is on every
tensor-parallel rank; pictures, not matrices, are shared out (fusion.py).

Legend: P patches of all pictures, n features, N heads, W head width, h hidden, H hidden of the decoder, D DeepStack layers.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import GELU, Embedding, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moexpand.parallel.pictures import Grid
from moexpand.parallel.rotary import RotaryTables
from moexpand.parallel.segments import Segments
from moexpand.parallel.shape import VisionShape

EPS = 1e-6
THETA = 10_000.0
"""Base of the rotary frequencies within a picture."""


class PatchProduct(torch.nn.Conv3d):
    """A convolution whose stride is its kernel, as one product. Its own call is what waits for its weights under overlap."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[P, C * F * S * S] to [P, h]."""
        return torch.nn.functional.linear(pixels.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbedding(Module):
    """A patch's pixels to its hidden state."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype) -> None:
        super().__init__()
        kernel = (shape.temporal_patch_size, shape.patch_size, shape.patch_size)
        self.proj = PatchProduct(shape.in_channels, shape.hidden_size, kernel, kernel, dtype=dtype)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[P, C * F * S * S] to [P, h]."""
        embedded: torch.Tensor = self.proj(pixels)
        return embedded


class Attention(Module):
    """Every patch of a frame attends to all patches of that frame."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.qkv = Linear(shape.hidden_size, 3 * shape.hidden_size, dtype=dtype)
        self.proj = Linear(shape.hidden_size, shape.hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor, frames: Segments, rotary: RotaryTables) -> torch.Tensor:
        """[P, h] to [P, h]."""
        query, key, value = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        query, key = (rotary.turn(each.to(rotary.cosines.dtype)).to(x.dtype) for each in (query, key))
        return self.proj(frames.compute(_attend, query, key, value).flatten(1))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int) -> torch.Tensor:
    """Frames of one length, [B*S, N, W] each."""
    batched = (each.unflatten(0, (-1, length)).transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)


class Perceptron(Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_fc1 = Linear(shape.hidden_size, shape.intermediate_size, dtype=dtype)
        self.linear_fc2 = Linear(shape.intermediate_size, shape.hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[P, h] to [P, h]."""
        return self.linear_fc2(torch.nn.functional.gelu(self.linear_fc1(x), approximate="tanh"))


class Block(Module):
    """Attention and perceptron, each behind a norm and added to what came in."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.hidden_size, EPS, dtype=dtype)
        self.norm2 = LayerNorm(shape.hidden_size, EPS, dtype=dtype)
        self.attn = Attention(shape, dtype)
        self.mlp = Perceptron(shape, dtype)

    def forward(self, x: torch.Tensor, frames: Segments, rotary: RotaryTables) -> torch.Tensor:
        """[P, h] to [P, h]."""
        x = x + self.attn(self.norm1(x), frames, rotary)
        return x + self.mlp(self.norm2(x))


class Merger(Module):
    """merge x merge patches to one feature of the decoder; the norm is over single patches, or (`joined`) over all of them."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype, joined: bool) -> None:
        super().__init__()
        self.joined, self.merged = joined, shape.hidden_size * shape.spatial_merge_size**2
        self.norm = LayerNorm(self.merged if joined else shape.hidden_size, EPS, dtype=dtype)
        self.linear_fc1 = Linear(self.merged, self.merged, dtype=dtype)
        self.act_fn = GELU()
        self.linear_fc2 = Linear(self.merged, shape.out_hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[P, h] to [n, H]."""
        normal = self.norm(x.view(-1, self.merged)) if self.joined else self.norm(x).view(-1, self.merged)
        return self.linear_fc2(self.act_fn(self.linear_fc1(normal)))


class VisionTower(Module):
    """Pixels of pictures to features, the main ones and those of DeepStack.

    Args:
        recompute: blocks are computed again in the backward pass instead of keeping what they computed.
    """

    def __init__(self, shape: VisionShape, dtype: torch.dtype, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype, self.recompute = shape, dtype, recompute
        self.patch_embed = PatchEmbedding(shape, dtype)
        self.pos_embed = Embedding(shape.num_position_embeddings, shape.hidden_size, dtype=dtype)
        self.blocks = ModuleList([Block(shape, dtype) for _ in range(shape.depth)])
        self.merger = Merger(shape, dtype, joined=False)
        self.deepstack_merger_list = ModuleList([Merger(shape, dtype, joined=True) for _ in shape.deepstack_visual_indexes])

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Features of pictures.

        Args:
            pixels: [P, C * F * S * S], patches in blocks of merge x merge.
            grids: of each picture.

        Returns:
            [n, 1 + D, H]: the main feature of each place, then those of DeepStack in the order of their blocks.
        """
        place = _Places(grids, self.shape.spatial_merge_size, pixels.device)
        x = self.patch_embed(pixels)
        x = x + self._positions(place).to(x.dtype)
        rotary = self._rotary(place)
        bounds = accumulate([0] + [rows * columns for frames, rows, columns in grids for _ in range(frames)])
        frames = Segments(pairwise(bounds), pixels.device)
        deep: dict[int, torch.Tensor] = {}
        for number, block in enumerate(self.blocks):
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, frames, rotary, use_reentrant=False)
            else:
                x = block(x, frames, rotary)
            if number in self.shape.deepstack_visual_indexes:
                deep[number] = self.deepstack_merger_list[self.shape.deepstack_visual_indexes.index(number)](x)
        return torch.stack([self.merger(x), *(deep[number] for number in sorted(deep))], dim=1)

    def _positions(self, place: "_Places") -> torch.Tensor:
        """[P, h], the square of learned positions drawn to the size of each picture, corner on corner, bilinearly."""
        side = int(self.shape.num_position_embeddings**0.5)
        wide = torch.promote_types(self.dtype, torch.float32)
        total: Any = 0
        for row, row_weight in _neighbours(place.row, place.rows, side, wide):
            for column, column_weight in _neighbours(place.column, place.columns, side, wide):
                total = total + self.pos_embed(row * side + column) * (row_weight * column_weight)[:, None]
        return total

    def _rotary(self, place: "_Places") -> RotaryTables:
        """A quarter of a head turns by the row, a quarter by the column, and so again for the second half."""
        wide = torch.promote_types(self.dtype, torch.float32)
        half = self.shape.hidden_size // self.shape.num_heads // 2
        exponents = torch.arange(0, half, 2, dtype=torch.int64, device=place.row.device).to(wide) / half
        frequencies = 1.0 / (THETA**exponents)
        angles = torch.cat([each[:, None].to(wide) * frequencies for each in (place.row, place.column)], dim=-1)
        both = torch.cat((angles, angles), dim=-1)[:, None]
        return RotaryTables(both.cos(), both.sin())


class _Places:
    """Row and column of every patch, and rows and columns of its picture, int64 [P]."""

    def __init__(self, grids: Sequence[Grid], merge: int, device: torch.device) -> None:
        places = []
        for frames, rows, columns in grids:
            numbers = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
            blocks = numbers.transpose(1, 2).flatten().repeat(frames)
            size = torch.tensor([rows, columns]).expand(len(blocks), 2)
            places.append(torch.cat((torch.stack((blocks // columns, blocks % columns), dim=1), size), dim=1))
        self.row, self.column, self.rows, self.columns = torch.cat(places).to(device).unbind(1)


def _neighbours(place: torch.Tensor, size: torch.Tensor, side: int, wide: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two entries of a row of `side` learned positions between which each place of `size` falls, and their weights."""
    exact = place.to(wide) * (side - 1) / (size - 1).clamp(min=1)
    below = exact.floor()
    weight = exact - below
    lower = below.long()
    return [(lower, 1 - weight), ((lower + 1).clamp(max=side - 1), weight)]
