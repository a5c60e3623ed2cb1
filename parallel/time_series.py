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
from torch.nn import GELU, Conv1d, Embedding, LayerNorm, Linear, Module, ModuleList, TransformerEncoder, TransformerEncoderLayer
from torch.nn.functional import gelu, pad, relu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from moexpand.base.series import padded_length, stride_of

CHUNK = 1 << 13
"""Points of all patches and channels that are encoded at a time, so that memory does not grow with the series."""


@dataclass(frozen=True)
class TimeSeriesShape:
    """Sizes of the encoder; the names are those of `ts_config`."""

    d_model: int = 1024
    encoder_layers: int = 17
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    max_source_positions: int = 1500
    num_mel_bins: int = 80
    ts_adapt_in_dim: int = 256
    ts_hidden_dim: int = 1024
    out_hidden_size: int = 4096
    patch_heads: int = 8
    patch_ffn_dim: int = 2048
    longest_patch: int = 20_000


class PatchPositions(Module):
    """Sines and cosines of a point's place in its patch, added; a buffer of the checkpoint."""

    pe: torch.Tensor

    def __init__(self, width: int, longest: int, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, width, 2, dtype=wide) * (-math.log(10_000.0) / width)
        angles = torch.arange(longest, dtype=wide)[:, None] * exponents.exp()
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        self.register_buffer("pe", table[:, None].to(dtype))

    def forward(self, x_BWD: torch.Tensor) -> torch.Tensor:
        """[B, W, D] to [B, W, D]."""
        return x_BWD + self.pe[: x_BWD.shape[1], 0]


class PatchEncoder(Module):
    """Patches of a series to frames of twice a patch's width, one for every two patches."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.ts_adapt_in_dim // 2
        self.conv = Conv1d(1, width, kernel_size=5, padding=2, dtype=dtype)
        layer = TransformerEncoderLayer(width, shape.patch_heads, shape.patch_ffn_dim, dropout=0.0, batch_first=True, dtype=dtype)
        self.transformer_encoder = TransformerEncoder(layer, 1, enable_nested_tensor=False)
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

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype) -> None:
        super().__init__()
        width = shape.d_model
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
    """Series to features. Each is encoded for itself, so that none depends on what it is batched with."""

    def __init__(self, shape: TimeSeriesShape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.encoder_embed = PatchEncoder(shape, dtype)
        self.encoder = FrameEncoder(shape, dtype)
        self.projector = Projector(shape, dtype)

    def forward(self, series: Sequence[torch.Tensor], rates: Sequence[float]) -> list[torch.Tensor]:
        """Features [tokens_of(n, rate), out_hidden_size] of every series [n, C], sampled at so many Hz."""
        return [
            self.projector(self.encoder(self.encoder_embed(each.to(self.dtype), rate)))
            for each, rate in zip(series, rates, strict=True)
        ]
