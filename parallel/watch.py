"""Looks over the routers' shoulders during a training step: how sure they are, and how far they still choose like the parent.

Sums over the tokens of the forward pass that has gradients, kept on the device and added up over all ranks at the end.

Legend: T tokens of this rank, E experts, G groups, K chosen, P experts of the parent, J experts that the parent chose, H hidden.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from moexpand.base.routing import select_experts
from moexpand.parallel import cpu
from moexpand.parallel.router import GroupedRouter


@dataclass(frozen=True)
class ParentRouter:
    """The router that a layer had before the expansion.

    Attributes:
        weight: [P, H].
        parent_of: int64 [E], of every expert.
        top_k, groups: J and the groups of the parent's own choice; without the latter the overlap is not known.
    """

    weight: torch.Tensor
    parent_of: torch.Tensor
    top_k: int
    groups: int | None = 1


FIGURES = ("entropy", "margin", "parent_overlap", "parents", "tokens")


class RouterWatch:
    """Measures, for each layer, averaged over its tokens:

    * `entropy`: of the probabilities, over ln E; 1 when the router does not care.
    * `margin`: least logit of a chosen expert minus greatest of one that was left out, mean over the groups; below 0 where a
      selection bias or replayed routes decide against the logits.
    * `parent_overlap`: part of the experts that the parent's router would choose, given the child's hidden state, whose copies
      are visited; `parents`: distinct parents visited. Only of layers in `parents`.

    Args:
        parents: by decoder layer.
        probe: hidden states that are kept of each layer's last micro-batch, for `siblings.output_similarity`.
    """

    def __init__(self, parents: Mapping[int, ParentRouter] | None = None, probe: int = 0) -> None:
        self._parents = dict(parents or {})
        self._probe = probe
        self._sums: dict[int, torch.Tensor] = {}
        self.probes: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self, routers: Sequence[GroupedRouter]) -> Iterator[None]:
        """Watch these routers inside the context."""
        self._sums, self.probes = {}, {}
        for router in routers:
            router.statistics = partial(self._add, router)
        try:
            yield
        finally:
            for router in routers:
                router.statistics = None

    @torch.no_grad()
    def _add(
        self, router: GroupedRouter, tokens_TH: torch.Tensor, logits_TE: torch.Tensor, probabilities_TE: torch.Tensor,
        chosen_TK: torch.Tensor,
    ) -> None:  # fmt: skip
        layer, groups = router.layer, router.groups
        entropy = torch.special.entr(probabilities_TE).sum() / math.log(logits_TE.shape[1])
        margin = torch.zeros_like(entropy)
        if chosen_TK.shape[1] < logits_TE.shape[1]:
            last_TG = logits_TE.gather(1, chosen_TK).unflatten(1, (groups, -1)).amin(-1)
            left_out_TG = logits_TE.scatter(1, chosen_TK, -torch.inf).unflatten(1, (groups, -1)).amax(-1)
            margin = (last_TG - left_out_TG).mean(1).sum()
        overlap, distinct = (torch.full_like(entropy, torch.nan) for _ in range(2))
        if layer in self._parents:
            overlap, distinct = _against_parent(self._parents[layer], tokens_TH, chosen_TK)
        tokens = torch.full_like(entropy, len(tokens_TH))
        added = torch.stack((entropy, margin, overlap, distinct, tokens)).double()
        self._sums[layer] = self._sums[layer] + added if layer in self._sums else added
        if self._probe:
            self.probes[layer] = tokens_TH[: self._probe].detach()

    def take(self, layers: int) -> dict[str, torch.Tensor]:
        """Means over the tokens of all ranks by name, float64 [layers], NaN where there is none. All ranks call it."""
        table = torch.zeros(layers, len(FIGURES), dtype=torch.float64, device=cpu.device())
        for layer, sums in self._sums.items():
            table[layer] = sums
        dist.all_reduce(table)
        columns = dict(zip(FIGURES, table.cpu().unbind(1), strict=True))
        tokens = columns.pop("tokens")
        return {name: torch.where(tokens > 0, sums / tokens, torch.nan) for name, sums in columns.items()}


def _against_parent(parent: ParentRouter, tokens_TH: torch.Tensor, chosen_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of the overlap and of the number of distinct parents visited."""
    wide = parent.weight.dtype
    logits_TP = torch.nn.functional.linear(tokens_TH.to(wide), parent.weight)
    visited_TP = torch.zeros_like(logits_TP, dtype=torch.bool).scatter_(1, parent.parent_of[chosen_TK], True)
    if parent.groups is None:
        return logits_TP.new_tensor(torch.nan), visited_TP.to(wide).sum()
    due_TJ = select_experts(torch.softmax(logits_TP, -1), parent.top_k, parent.groups)
    return visited_TP.gather(1, due_TJ).to(wide).mean(1).sum(), visited_TP.to(wide).sum()
