"""Routes: which experts every token of a step visited in every layer, recorded in one forward pass and replayed in another.

Their form is told in base/routes.py. Replayed tokens visit the recorded experts, with weights from the logits of the moment.

Legend: T tokens of a step's micro-batches on one data-parallel rank, L decoder layers, K chosen.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from moexpand.base.routes import compact
from moexpand.parallel import cpu


class Routes:
    """Routes of a step's micro-batches on this rank, as a recorder or to be replayed.

    Args:
        layers: L.
        tokens: T.
        replay: [T, L, K], to be replayed; None records.
    """

    def __init__(self, layers: int, tokens: int, top_k: int, replay: torch.Tensor | None = None) -> None:
        self.replay = replay
        self.recorded: torch.Tensor | None = None
        if replay is None:
            self.recorded = torch.zeros(tokens, layers, top_k, dtype=torch.int32, device=cpu.device())

    @classmethod
    def replaying(cls, several: Sequence[np.ndarray]) -> "Routes":
        """Routes of several micro-batches, each [tokens, L, K], one behind the other."""
        whole = np.concatenate(several).astype(np.int32)
        # Columns in order of the groups, as dispatchers expect them.
        whole.sort(axis=-1)
        tokens, layers, top_k = whole.shape
        return cls(layers, tokens, top_k, torch.from_numpy(whole).to(cpu.device()))

    def look_up(self, layer: int, index_T: torch.Tensor) -> torch.Tensor | None:
        """The experts to visit, int64 [T', K], by the tokens' numbers; None while recording."""
        return None if self.replay is None else self.replay[index_T, layer].long()

    def note(self, layer: int, index_T: torch.Tensor, chosen_TK: torch.Tensor) -> None:
        """Record the choice of some tokens."""
        assert self.recorded is not None
        self.recorded[index_T, layer] = chosen_TK.to(torch.int32)

    def collect(self, groups: Sequence[dist.ProcessGroup], num_experts: int) -> np.ndarray:
        """All layers' choices for all tokens, [T, L, K], the same on every rank of the groups that share the micro-batches."""
        assert self.recorded is not None
        for group in groups:
            dist.all_reduce(self.recorded, group=group)
        return self.recorded.cpu().numpy().astype(compact(num_experts))
