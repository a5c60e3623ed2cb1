"""Intern-S1-Pro's time-series encoder: series of any length, sampling rate and number of channels to the decoder's features.

A series is cut into overlapping patches, whose stride follows from its sampling rate (base/series.py). Every channel of a patch
is encoded for itself and the channels are averaged; neighbouring patches are joined in pairs; an encoder of Whisper's kind with a
causal mask halves their number; a projector ends in the decoder's width. Modules and parameters have the names that LMDeploy's
have behind `model.time_series.`. There is no dropout.

Legend: n points, C channels, p patches, S stride, W = 2 S points of a patch, D width of a patch, f frames, t tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import GELU, Conv1d, Embedding, LayerNorm, Linear, Module, ModuleList, Parameter
from torch.nn.functional import gelu, pad, relu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moexpand.base.series import padded_length, stride_of
from moexpand.parallel.shape import TimeSeriesShape

CHUNK = 1 << 13
"""Points of all patches and channels that are encoded at a time, so that memory does not grow with the series."""


@dataclass(frozen=True)
class Series:
    """All time series of a micro-batch in the order of their tokens.

    Attributes:
        values: float32 [n, C] each, in main memory: each rank takes what it computes to its device.
        rates: sampling rate of each in Hz.
    """

    values: list[torch.Tensor]
    rates: list[float]


class PatchPositions(Module):
    """Sines and cosines of a point's place in its patch, added."""

    pe: torch.Tensor

    def __init__(self, width: int, longest: int, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, width, 2, dtype=wide) * (-math.log(10_000.0) / width)
        angles = torch.arange(longest, dtype=wide)[:, None] * exponents.exp()
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        self.register_buffer("pe", table[:, None].to(dtype), persistent=False)

    def forward(self, x_BWD: torch.Tensor) -> torch.Tensor:
        """[B, W, D] to [B, W, D]."""
        return x_BWD + self.pe[: x_BWD.shape[1], 0]


class PatchAttention(Module):
    """Every point of a patch attends to all of its points. Parameters have the names of torch's MultiheadAttention.

    That class reads the weights of `out_proj` without calling it, so nothing could wait for them under `parallel.overlap`.
    """

    def __init__(self, width: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = Parameter(torch.nn.init.xavier_uniform_(torch.empty(3 * width, width, dtype=dtype)))
        self.in_proj_bias = Parameter(torch.zeros(3 * width, dtype=dtype))
        self.out_proj = Linear(width, width, dtype=dtype)

    def forward(self, x_BWD: torch.Tensor) -> torch.Tensor:
        """[B, W, D] to [B, W, D]."""
        joint = torch.nn.functional.linear(x_BWD, self.in_proj_weight, self.in_proj_bias)
        query, key, value = joint.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out_proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class PatchLayer(Module):
    """Attention and perceptron, each added to what came in and then normalised, as torch's TransformerEncoderLayer is."""

    def __init__(self, width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = PatchAttention(width, heads, dtype)
        self.linear1 = Linear(width, inner, dtype=dtype)
        self.linear2 = Linear(inner, width, dtype=dtype)
        self.norm1 = LayerNorm(width, dtype=dtype)
        self.norm2 = LayerNorm(width, dtype=dtype)

    def forward(self, x_BWD: torch.Tensor) -> torch.Tensor:
        """[B, W, D] to [B, W, D]."""
        x_BWD = self.norm1(x_BWD + self.self_attn(x_BWD))
        return self.norm2(x_BWD + self.linear2(relu(self.linear1(x_BWD))))


class PatchTransformer(Module):
    """The layers of a patch's encoder, of which there is one."""

    def __init__(self, layer: PatchLayer) -> None:
        super().__init__()
        self.layers = ModuleList([layer])

    def forward(self, x_BWD: torch.Tensor) -> torch.Tensor:
        """[B, W, D] to [B, W, D]."""
        for layer in self.layers:
            x_BWD = layer(x_BWD)
        return x_BWD


class PatchEncoder(Module):
    """Patches of a series to frames of twice a patch's width, one for every two patches."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.ts_adapt_in_dim // 2
        self.conv = Conv1d(1, width, kernel_size=5, padding=2, dtype=dtype)
        self.transformer_encoder = PatchTransformer(PatchLayer(width, shape.patch_heads, shape.patch_ffn_dim, dtype))
        self.pos_encoder = PatchPositions(width, shape.longest_patch, dtype)

    def forward(self, series_nC: torch.Tensor, rate: float) -> torch.Tensor:
        """[n, C] to [f, 2 D]."""
        stride, points = stride_of(rate), len(series_nC)
        filled = pad(series_nC, (0, 0, 0, padded_length(points, rate) - points))
        patches_pCW = filled.unfold(0, 2 * stride, stride)
        at_a_time = max(1, CHUNK // (patches_pCW.shape[1] * 2 * stride))
        encoded_pD = torch.cat([self._chunk(chunk) for chunk in patches_pCW.split(at_a_time)])
        pairs = len(encoded_pD) // 2
        return encoded_pD[: 2 * pairs].view(pairs, -1)

    def _chunk(self, patches_pCW: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self._encode, patches_pCW, use_reentrant=False)
        return self._encode(patches_pCW)

    def _encode(self, patches_pCW: torch.Tensor) -> torch.Tensor:
        """[p, C, W] to [p, D]: every channel for itself, then means over the points and over the channels."""
        patches, channels, width = patches_pCW.shape
        x = relu(self.conv(patches_pCW.reshape(patches * channels, 1, width))).transpose(1, 2)
        x = self.transformer_encoder(self.pos_encoder(x)).mean(1)
        return x.view(patches, channels, -1).mean(1)


class Attention(Module):
    """A frame attends to itself and the frames before it."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.d_model
        self.heads = shape.encoder_attention_heads
        self.q_proj = Linear(width, width, dtype=dtype)
        self.k_proj = Linear(width, width, bias=False, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.out_proj = Linear(width, width, dtype=dtype)

    def forward(self, x_tD: torch.Tensor) -> torch.Tensor:
        """[t, d_model] to [t, d_model]."""
        query, key, value = (
            each(x_tD).unflatten(-1, (self.heads, -1)).transpose(0, 1) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(0, 1).flatten(1))


class EncoderLayer(Module):
    """Attention and perceptron, each behind a norm and added to what came in."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(shape, dtype)
        self.self_attn_layer_norm = LayerNorm(shape.d_model, dtype=dtype)
        self.fc1 = Linear(shape.d_model, shape.encoder_ffn_dim, dtype=dtype)
        self.fc2 = Linear(shape.encoder_ffn_dim, shape.d_model, dtype=dtype)
        self.final_layer_norm = LayerNorm(shape.d_model, dtype=dtype)

    def forward(self, x_tD: torch.Tensor) -> torch.Tensor:
        """[t, d_model] to [t, d_model]."""
        x_tD = x_tD + self.self_attn(self.self_attn_layer_norm(x_tD))
        return x_tD + self.fc2(gelu(self.fc1(self.final_layer_norm(x_tD))))


class FrameEncoder(Module):
    """Frames to half as many tokens, as Whisper does it, with a causal mask and learned positions (0 beyond the table)."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype, recompute: bool) -> None:
        super().__init__()
        self.recompute, width = recompute, shape.d_model
        self.adapt_in = Linear(shape.ts_adapt_in_dim, shape.num_mel_bins, dtype=dtype)
        self.conv1 = Conv1d(shape.num_mel_bins, width, kernel_size=3, padding=1, dtype=dtype)
        self.conv2 = Conv1d(width, width, kernel_size=3, stride=2, padding=1, dtype=dtype)
        self.embed_positions = Embedding(shape.max_source_positions, width, dtype=dtype)
        self.layers = ModuleList([EncoderLayer(shape, dtype) for _ in range(shape.encoder_layers)])
        self.layer_norm = LayerNorm(width, dtype=dtype)
        self.adapt_out = Linear(width, shape.ts_hidden_dim, dtype=dtype)

    def forward(self, frames_fD: torch.Tensor) -> torch.Tensor:
        """[f, ts_adapt_in_dim] to [t, ts_hidden_dim], t = (f + 1) // 2."""
        x = self.adapt_in(frames_fD).T[None]
        x_tD = gelu(self.conv2(gelu(self.conv1(x))))[0].T
        known = min(len(x_tD), self.embed_positions.num_embeddings)
        positions = self.embed_positions(torch.arange(known, device=x_tD.device))
        x_tD = x_tD + pad(positions, (0, 0, 0, len(x_tD) - len(positions)))
        for layer in self.layers:
            if self.recompute and self.training and torch.is_grad_enabled():
                x_tD = checkpoint(layer, x_tD, use_reentrant=False)
            else:
                x_tD = layer(x_tD)
        return self.adapt_out(self.layer_norm(x_tD))


class Projector(Module):
    """To the decoder's width."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(shape.ts_hidden_dim, dtype=dtype)
        self.linear_1 = Linear(shape.ts_hidden_dim, shape.out_hidden_size, dtype=dtype)
        self.act = GELU()
        self.linear_2 = Linear(shape.out_hidden_size, shape.out_hidden_size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[t, ts_hidden_dim] to [t, out_hidden_size]."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(x))))


class TimeSeriesEncoder(Module):
    """Series to features. Each is encoded for itself, so that none depends on what it is batched with.

    Args:
        recompute: layers are computed again in the backward pass instead of keeping what they computed; patches always are.
    """

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype = torch.float32, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.encoder_embed = PatchEncoder(shape, dtype)
        self.encoder = FrameEncoder(shape, dtype, recompute)
        self.projector = Projector(shape, dtype)

    def forward(self, series: Sequence[torch.Tensor], rates: Sequence[float]) -> list[torch.Tensor]:
        """Features [tokens_of(n, rate), out_hidden_size] of every series [n, C], sampled at so many Hz."""
        return [
            self.projector(self.encoder(self.encoder_embed(each.to(self.dtype), rate)))
            for each, rate in zip(series, rates, strict=True)
        ]
