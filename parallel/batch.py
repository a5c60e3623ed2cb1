"""A micro-batch on the device: one packed stream of tokens, and the pictures and time series whose places are in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moexpand.base.series import tokens_of
from moexpand.parallel import context, pictures
from moexpand.parallel.fusion import DeepFeatures
from moexpand.parallel.pictures import Pictures
from moexpand.parallel.rotary import RotaryTables
from moexpand.parallel.segments import Segments
from moexpand.parallel.shape import ModelShape
from moexpand.parallel.time_series import Series


@dataclass
class Stream(PackedSeqParams):
    """What every layer is told of this rank's part of a stream; the stage completes it at the beginning of a forward pass.

    The format is `sbhd` on purpose: our attention reads the boundaries itself, and Megatron-Core then leaves the stream as it is.
    """

    positions: torch.Tensor | None = None
    pictures: Pictures | None = None
    feature_at: torch.Tensor | None = None
    series: Series | None = None
    series_at: torch.Tensor | None = None
    rotary: RotaryTables | None = None
    deep: DeepFeatures | None = None
    _segments: dict[int, Segments] = field(default_factory=dict)

    def segments(self, part: int, bounds: Iterable[tuple[int, int]], device: torch.device) -> Segments:
        """The segments of a part of the stream, the same object for all layers."""
        if part not in self._segments:
            self._segments[part] = Segments(bounds, device)
        return self._segments[part]


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of concatenated segments.

    Attributes:
        tokens, labels: int64 [T].
        positions: int64 [T], or [3, T] (time, height, width); they restart at every segment.
        loss_mask: float32 [T], 1 where the label counts.
        cu_seqlens: int32 [segments + 1] on the CPU, where each segment begins; the last entry is T. Under context parallelism
            it is that of the whole stream also where the others are one rank's part.
        feature_at: int64 [T], which feature of the pictures stands at a token, -1 at all others; None without a tower.
        pictures: all of the whole stream.
        series_at, series: the same of time series.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    feature_at: torch.Tensor | None = None
    pictures: Pictures | None = None
    series_at: torch.Tensor | None = None
    series: Series | None = None

    @classmethod
    def from_arrays(
        cls, arrays: Any, device: torch.device, shape: ModelShape | None = None, pixel_table: np.ndarray | None = None
    ) -> "PackedBatch":
        """From any object with numpy arrays of the names above, such as the loader's micro-batches.

        Args:
            arrays: with pictures also `patches`, uint8 [P, C * S * S], and `grids`, int64 [pictures, 3]; with time series
                `series`, float32 [n, C] each, and `rates` in Hz.
            shape: of the model that takes the batch; needed for one with a tower or with positions on three axes.
            pixel_table: float32 [C, 256], the value of each byte of each colour; needed where there are pictures.
        """

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        positions = arrays.positions
        seen: dict[str, Any] = {}
        if shape is not None and shape.vision is not None:
            token, merge = shape.vision.image_token_id, shape.vision.spatial_merge_size
            patches: Any = getattr(arrays, "patches", None)
            grids = [] if patches is None else [tuple(grid) for grid in arrays.grids.tolist()]
            if grids:  # without any, the token is one of text, if it is there
                assert pixel_table is not None
                due = sum(pictures.features_of(grid, merge) for grid in grids)
                seen["feature_at"] = on_device(_places(arrays.tokens, token, due))
                seen["pictures"] = Pictures(torch.from_numpy(np.ascontiguousarray(patches)), grids, on_device(pixel_table))
            if shape.mrope_section:
                positions = pictures.axes(arrays.tokens, arrays.cu_seqlens, grids, token, merge)
        if shape is not None and shape.time_series is not None and getattr(arrays, "series", None):
            due = sum(tokens_of(len(each), rate) for each, rate in zip(arrays.series, arrays.rates, strict=True))
            seen["series_at"] = on_device(_places(arrays.tokens, shape.time_series.ts_token_id, due))
            seen["series"] = Series([torch.from_numpy(np.ascontiguousarray(each)) for each in arrays.series], list(arrays.rates))
        return cls(
            tokens=on_device(arrays.tokens),
            labels=on_device(arrays.labels),
            positions=on_device(positions),
            loss_mask=on_device(arrays.loss_mask),
            cu_seqlens=torch.from_numpy(np.asarray(arrays.cu_seqlens, dtype=np.int32)),
            **seen,
        )

    @classmethod
    def from_sequences(cls, tokens_BS: torch.Tensor) -> "PackedBatch":
        """B sequences of S tokens, each a segment of its own; every token but the last of a sequence predicts the next."""
        batch, length = tokens_BS.shape
        mask = torch.ones(batch, length)
        mask[:, -1] = 0
        return cls(
            tokens=tokens_BS.flatten(),
            labels=tokens_BS.roll(-1, dims=1).flatten(),
            positions=torch.arange(length, device=tokens_BS.device).repeat(batch),
            loss_mask=mask.flatten().to(tokens_BS.device),
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32) * length,
        )

    def split(self, first: int) -> tuple["PackedBatch", torch.Tensor]:
        """This context-parallel rank's tokens, and their tags (see `GroupedRouter`), int64.

        Args:
            first: number of the stream's first token among those of the step.
        """
        numbers = torch.arange(first, first + self.tokens.numel(), device=self.tokens.device)
        tags = 2 * numbers + (self.loss_mask == 0)
        names = ("tokens", "labels", "loss_mask", "feature_at", "series_at")
        own: dict[str, Any] = {name: context.split(whole) for name in names if (whole := getattr(self, name)) is not None}
        own["positions"] = context.split(self.positions.movedim(-1, 0)).movedim(0, -1)
        return replace(self, **own), context.split(tags)

    def stream(self) -> Stream:
        """The segments in Megatron-Core's words, and what the stage needs beside them."""
        return Stream(
            qkv_format="sbhd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            positions=self.positions,
            pictures=self.pictures,
            feature_at=self.feature_at,
            series=self.series,
            series_at=self.series_at,
        )


def _places(tokens: np.ndarray, placeholder: int, features: int) -> np.ndarray:
    """Which feature stands at each token, see `pictures.feature_at`."""
    found = int((tokens == placeholder).sum())
    assert found == features, f"{found} tokens {placeholder} hold the places of {features} features"
    return pictures.feature_at(tokens, placeholder)
