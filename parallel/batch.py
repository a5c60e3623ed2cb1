"""A micro-batch on the device: one packed stream of tokens."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moexpand.parallel import context


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of concatenated segments.

    Attributes:
        tokens, labels, positions: int64 [T]; positions restart at every segment.
        loss_mask: float32 [T], 1 where the label counts.
        cu_seqlens: int32 [segments + 1] on the CPU, where each segment begins; the last entry is T. Under context parallelism
            it is that of the whole stream also where the others are one rank's part.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def from_arrays(cls, arrays: Any, device: torch.device) -> "PackedBatch":
        """From any object with numpy arrays of the names above, such as the loader's micro-batches."""

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            tokens=on_device(arrays.tokens),
            labels=on_device(arrays.labels),
            positions=on_device(arrays.positions),
            loss_mask=on_device(arrays.loss_mask),
            cu_seqlens=torch.from_numpy(np.asarray(arrays.cu_seqlens, dtype=np.int32)),
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
        names = ("tokens", "labels", "positions", "loss_mask")
        return replace(self, **{name: context.split(getattr(self, name)) for name in names}), context.split(tags)

    def packed_seq_params(self) -> PackedSeqParams:
        """The segments in Megatron-Core's words.

        The format is `sbhd` on purpose: our attention reads the boundaries itself, and Megatron-Core then leaves the stream as
        it is and applies the angles that `RotaryAngles` gives for each token.
        """
        return PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=self.cu_seqlens, cu_seqlens_kv=self.cu_seqlens)
