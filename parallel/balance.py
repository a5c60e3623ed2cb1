"""Auxiliary losses of a router: Switch balance loss overall and inside groups, and z-loss, with a stated scope.

Counts come from the choice that is dispatched. The gradients of a step are sums over tokens, divided by the step's unmasked
tokens at the end, so an auxiliary loss is a sum here too and ends as a mean over them, on every layout.

* `micro`: the balance of one micro-batch, all of its tokens together, masked ones included, on the tensor- and context-parallel
  ranks that share it. It counts in proportion to its unmasked tokens. Equal for every layout at the same micro-batch size.
* `global`: the loads are those of the whole previous step, over all ranks (uniform before the first), and the probabilities are
  averaged over this step's unmasked tokens. Equal for every layout and every micro-batch size.

Legend: T tokens of this rank, E experts, K chosen, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moexpand.base.routing import balance_loss, group_probabilities
from moexpand.parallel.shape import RouterRules


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        logits, probabilities: [T, E] with gradient.
        chosen: int64 [T, K].
        unmasked: bool [T], True where the token's loss counts.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    chosen: torch.Tensor
    unmasked: torch.Tensor


class BalanceLosses:
    """The losses of one router.

    Args:
        group: the ranks that share a micro-batch.
        factor: multiplies all coefficients in this layer.
    """

    def __init__(self, rules: RouterRules, top_k: int, groups: int, scoring: str, group: Any, factor: float) -> None:
        self.top_k, self.groups, self.scoring, self.group, self.scope = top_k, groups, scoring, group, rules.scope
        self.coefficients = [
            factor * value for value in (rules.balance_coefficient, rules.group_coefficient, rules.z_loss_coefficient)
        ]

    def __call__(
        self, routing: Routing, counts_E: torch.Tensor, previous_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The losses of this rank's tokens.

        Args:
            counts_E: int64, token copies of this rank sent to each expert.
            previous_E: the load of the whole previous step (scope `global`).

        Returns:
            Overall balance, balance inside groups (0 where it has no weight) and z-loss, each times the unmasked tokens and
            without its coefficient, detached [3]; and their weighted sum to be added to the step's loss, None where nothing has
            a weight. Both are this rank's share; shares add up over the ranks.
        """
        measured = self._global(routing, previous_E) if self.scope == "global" else self._micro(routing, counts_E)
        losses = torch.stack(measured)
        if not any(self.coefficients):
            return losses.detach(), None
        weighted = [value * loss for value, loss in zip(self.coefficients, measured, strict=True) if value]
        return losses.detach(), torch.stack(weighted).sum()

    def _inside(self, routing: Routing, overall: torch.Tensor, loss: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """The loss inside groups, from the loss of given probabilities and number of groups."""
        if not self.coefficients[1]:
            return torch.zeros_like(overall)
        return loss(group_probabilities(routing.logits, self.groups, self.scoring), self.groups)

    def _squares(self, routing: Routing) -> torch.Tensor:
        """Square of the logits' logsumexp [T]."""
        logits = routing.logits if self.coefficients[2] else routing.logits.detach()
        return torch.logsumexp(logits, dim=-1).square()

    def _micro(self, routing: Routing, counts_E: torch.Tensor) -> list[torch.Tensor]:
        sizes = torch.stack((torch.tensor(len(routing.chosen), device=counts_E.device), routing.unmasked.sum()))
        summed = torch.cat((counts_E, sizes))
        if self.group.size() > 1:
            torch.distributed.all_reduce(summed, group=self.group)
        counts, (tokens, unmasked) = summed[:-2].to(routing.probabilities.dtype), summed[-2:]

        def loss(probabilities_TE: torch.Tensor, groups: int = 1) -> torch.Tensor:
            return balance_loss(probabilities_TE.sum(0), counts, tokens, self.top_k, groups) * unmasked

        overall = loss(routing.probabilities)
        return [overall, self._inside(routing, overall, loss), self._squares(routing).sum() * unmasked / tokens]

    def _global(self, routing: Routing, previous_E: torch.Tensor) -> list[torch.Tensor]:
        mask_1T = routing.unmasked.to(routing.probabilities.dtype)[None]
        # balance_loss of one token: E * sum_e (n_e / sum n) p_te
        load_E = (previous_E / previous_E.sum()).to(routing.probabilities.dtype) * len(previous_E)

        def loss(probabilities_TE: torch.Tensor, groups: int = 1) -> torch.Tensor:
            return ((mask_1T @ probabilities_TE)[0] * load_E).sum() / groups

        overall = loss(routing.probabilities)
        return [overall, self._inside(routing, overall, loss), (self._squares(routing) * mask_1T[0]).sum()]
