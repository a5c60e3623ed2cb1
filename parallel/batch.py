"""A micro-batch on the device: one packed stream of tokens, and the pictures whose places are in it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moexpand.parallel import context, pictures
from moexpand.parallel.fusion import DeepFeatures
from moexpand.parallel.pictures import Pictures
from moexpand.parallel.rotary import RotaryTables
from moexpand.parallel.shape import ModelShape


@dataclass
class Stream(PackedSeqParams):
    """What every layer is told of this rank's part of a stream; the stage completes it at the beginning of a forward pass.

    The format is `sbhd` on purpose: our attention reads the boundaries itself, and Megatron-Core then leaves the stream as it is.
    """

    positions: torch.Tensor | None = None
    pictures: Pictures | None = None
    feature_at: torch.Tensor | None = None
    rotary: RotaryTables | None = None
    deep: DeepFeatures | None = None


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
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    feature_at: torch.Tensor | None = None
    pictures: Pictures | None = None

    @classmethod
    def from_arrays(
        cls, arrays: Any, device: torch.device, shape: ModelShape | None = None, pixel_table: np.ndarray | None = None
    ) -> "PackedBatch":
        """From any object with numpy arrays of the names above, such as the loader's micro-batches.

        Args:
            arrays: with pictures also `patches`, uint8 [P, C * S * S], and `grids`, int64 [pictures, 3].
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
            places = int((arrays.tokens == token).sum())
            due = sum(pictures.features_of(grid, merge) for grid in grids)
            assert places == due, f"{places} placeholders stand for pictures of {due} features"
            seen["feature_at"] = on_device(pictures.feature_at(arrays.tokens, token))
            if grids:
                assert pixel_table is not None
                seen["pictures"] = Pictures(on_device(patches), grids, on_device(pixel_table))
            if shape.mrope_section:
                positions = pictures.axes(arrays.tokens, arrays.cu_seqlens, grids, token, merge)
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
        names = ("tokens", "labels", "loss_mask") + (("feature_at",) if self.feature_at is not None else ())
        own: dict[str, Any] = {name: context.split(getattr(self, name)) for name in names}
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
        )
