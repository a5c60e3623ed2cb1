"""Rotary position embedding by explicit position: every token of a packed stream brings its own."""

import torch


class RotaryAngles(torch.nn.Module):
    """Stands where Megatron-Core's GPTModel keeps its RotaryEmbedding and gives it angles for the positions of the micro-batch.

    Megatron-Core applies them as usual (cos and sin of the angle, halves rotated), once for each layer.
    """

    def __init__(self, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(self.dtype) / head_dim
        self.inverse_frequencies = 1.0 / (base**exponents)
        self.positions: torch.Tensor | None = None

    def get_rotary_seq_len(self, *unused: object) -> int:
        """Part of Megatron-Core's protocol; the positions alone decide."""
        return 0

    def forward(self, seq_len: int, packed_seq: bool = False, cp_group: object = None) -> torch.Tensor:
        """Angles [T, 1, 1, head_dim] in fp32 of the positions set for this micro-batch."""
        assert self.positions is not None
        frequencies = self.inverse_frequencies.to(self.positions.device)
        angles = self.positions.to(self.dtype)[:, None] * frequencies
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
