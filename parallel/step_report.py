"""What an optimiser step reports, and when it leaves the weights as they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

Refusal = Callable[[float, float], str]
"""Given loss and gradient norm, why the weights shall stay; empty when they shall not."""


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did, the same on every rank.

    Attributes:
        loss: sum of the losses of the unmasked tokens of the global batch, divided by their number.
        tokens: that number.
        grad_norm: of all gradients before clipping.
        skipped: why the weights stayed as they were; empty when they were updated.
        dispatched: float64 [layers, experts], token copies sent to each expert.
        balance, group_balance, z_loss: float64 [layers], means over the unmasked tokens, without their coefficients;
            `group_balance` is 0 where it has no coefficient.
        rank_rows: float64 [ranks], rows that the experts of each rank computed, over its layers and micro-batches.
        seconds: this rank's time in the parts of the step (empty unless asked for).
        watched: what the `RouterWatch` found, by name, float64 [layers] (empty without one).
        routes: [T, layers, K] of each of this data-parallel rank's micro-batches, where recording was asked for.
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: str
    dispatched: torch.Tensor
    balance: torch.Tensor
    group_balance: torch.Tensor
    z_loss: torch.Tensor
    rank_rows: torch.Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    watched: dict[str, torch.Tensor] = field(default_factory=dict)
    routes: list[np.ndarray] | None = None


def why_not(refused: Refusal | None, loss: float, grad_norm: float) -> str:
    """Why the weights are not updated, the same on every rank; empty when they are."""
    for name, number in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(number):
            return f"the {name} is {number}"
    return "" if refused is None else refused(loss, grad_norm)
