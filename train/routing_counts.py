"""Counts of what the routers of one rank chose, kept on its device and added up over the ranks at the end.

Legend: T tokens of a batch on this rank, C counted ones, E experts, K chosen, N tokens of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moexpand.base.errors import CheckFailed
from moexpand.parallel import cpu, ranks
from moexpand.upcycle.calibration import LayerCounts


@dataclass(frozen=True)
class Places:
    """Which of a batch's tokens on this rank matter; int64.

    Attributes:
        counted: [C], tokens that count.
        sampled: tokens whose logits are kept.
        rows: where in the sample these logits belong.
    """

    counted: torch.Tensor
    sampled: torch.Tensor
    rows: torch.Tensor


def places_of(counted_T: np.ndarray, first: int, sample_N: np.ndarray, part: int, parts: int) -> Places:
    """The places of one of several equal parts of a batch.

    Args:
        counted_T: [T] of the whole batch, positive where the token counts.
        first: the number of the batch's first counted token among those of the whole run.
        sample_N: int64 [N], increasing, numbers of the counted tokens whose logits are kept.
        part, parts: which part of how many.
    """
    counted_C = np.flatnonzero(counted_T)
    rows = np.arange(*np.searchsorted(sample_N, [first, first + len(counted_C)]))
    sampled = counted_C[sample_N[rows] - first]
    size = len(counted_T) // parts
    inside = sampled // size == part
    found = (counted_C[counted_C // size == part] - part * size, sampled[inside] - part * size, rows[inside])
    return Places(*(torch.from_numpy(indices).to(cpu.device()) for indices in found))


class RoutingCounts:
    """Counts of some layers, and the logits of a sample of tokens.

    Args:
        layers: decoder layers of this rank.
        num_experts, top_k: E and K.
        sample: N.
    """

    def __init__(self, layers: list[int], num_experts: int, top_k: int, sample: int) -> None:
        self._shapes = {"rank": (top_k, num_experts), "coactivation": (num_experts, num_experts), "logits": (sample, num_experts)}
        self._tables = {layer: self._zeros() for layer in layers}

    def _zeros(self) -> dict[str, torch.Tensor]:
        dtypes = {"logits": torch.float32}
        return {
            name: torch.zeros(shape, dtype=dtypes.get(name, torch.int64), device=cpu.device())
            for name, shape in self._shapes.items()
        }

    def add(self, layer: int, logits_TE: torch.Tensor, chosen_TK: torch.Tensor, places: Places) -> None:
        """Count one layer's routing of one batch."""
        table, (top_k, experts) = self._tables[layer], self._shapes["rank"]
        chosen_CK = chosen_TK[places.counted]
        # Under grouped routing the columns come in order of the groups; here they count from the largest logit down.
        order_CK = logits_TE[places.counted].gather(1, chosen_CK).argsort(dim=1, descending=True, stable=True)
        cell_CK = chosen_CK.gather(1, order_CK) + experts * torch.arange(top_k, device=chosen_CK.device)
        table["rank"] += torch.bincount(cell_CK.flatten(), minlength=top_k * experts).view(top_k, experts)
        # Sums of products of 0 and 1 are exact in fp32 up to 2^24 tokens.
        visits_CE = logits_TE.new_zeros(len(chosen_CK), experts, dtype=torch.float32).scatter_(1, chosen_CK, 1.0)
        table["coactivation"] += (visits_CE.T @ visits_CE).to(torch.int64).fill_diagonal_(0)
        table["logits"][places.rows] = logits_TE[places.sampled].float()

    def totals(self) -> Iterator[tuple[int, LayerCounts, np.ndarray]]:
        """Layer, counts and logits [N, E] of every layer of the model, over all ranks; every rank must walk through it.

        Raises:
            CheckFailed: logits are not finite.
        """
        for layer in sorted(set().union(*ranks.gather(list(self._tables)))):
            mine = self._tables.get(layer) or self._zeros()
            whole = {name: ranks.add_up(tensor).cpu().numpy() for name, tensor in mine.items()}
            if not np.isfinite(whole["logits"]).all():
                raise CheckFailed(
                    f"The router logits of layer {layer} are not all finite; its weights or the precision are at fault."
                )
            yield layer, LayerCounts(whole["rank"].sum(0), whole["rank"], whole["coactivation"]), whole["logits"]
