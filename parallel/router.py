"""The router inside Megatron-Core: routing maths of base/routing.py, auxiliary losses, counts of what was dispatched.

Legend: T tokens of this rank, E experts, K chosen, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from moexpand.base.routing import balance_loss, route
from moexpand.parallel.shape import RouterRules


class GroupedRouter(Router):
    """Top-(K/G) in every group, weights and gradient by `moexpand.base.routing.route`, logits in fp32 or wider.

    The balance loss has the scope of one micro-batch: its tokens on all tensor- and context-parallel ranks together, padding
    included. The gradients of a step are sums over tokens, divided by the step's unmasked tokens at the end; so an auxiliary
    loss is multiplied by the unmasked tokens of its micro-batch and ends as the token-weighted mean over micro-batches, on
    every layout. Which tokens are masked arrives as Megatron-Core's `padding_mask`, which travels with the hidden states through
    recomputation and pipeline schedules.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        pg_collection: Any = None,
        groups: int,
        renormalise: bool,
        rules: RouterRules,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.top_k = config.moe_router_topk
        self.groups = groups
        self.renormalise = renormalise
        self.rules = rules
        self.compact = False
        self.observer: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        """Outside training it is told the decoder layer, logits [T, E] and chosen experts [T, K]."""
        self.register_buffer("dispatched", torch.zeros(config.num_moe_experts, dtype=torch.float64), persistent=False)
        self.register_buffer("losses", torch.zeros(2, dtype=torch.float64), persistent=False)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, E] and mask [T, 1] to what the dispatcher takes (see `forward`)."""
        rules = self.rules
        weights_TK, chosen_TK, probabilities_TE = route(
            logits, self.top_k, self.groups, self.renormalise, gradient=rules.gradient, temperature=rules.temperature
        )
        if self.training and torch.is_grad_enabled():
            unmasked = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
            weights_TK = self._with_auxiliary_losses(weights_TK, chosen_TK, probabilities_TE, logits, unmasked)
        if self.observer is not None and not self.training:
            self.observer(self.layer_number - 1, logits, chosen_TK)
        if self.compact:
            return weights_TK, chosen_TK
        dense_TE = torch.zeros_like(probabilities_TE).scatter(1, chosen_TK, weights_TK)
        map_TE = torch.zeros_like(probabilities_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
        return dense_TE, map_TE

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Route hidden states.

        Args:
            input: [T, 1, H].
            padding_mask: bool [T, 1], True where the token's loss does not count.

        Returns:
            For Megatron-Core's dispatchers weights [T, E] (zero where not chosen) and a bool map [T, E]; for ours
            (`compact`) weights [T, K] and chosen experts int64 [T, K].
        """
        tokens_TH = input.flatten(0, -2)
        wide = torch.promote_types(tokens_TH.dtype, torch.float32)
        return self.routing(torch.nn.functional.linear(tokens_TH.to(wide), self.weight.to(wide)), padding_mask)

    def _with_auxiliary_losses(
        self,
        weights_TK: torch.Tensor,
        chosen_TK: torch.Tensor,
        probabilities_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        unmasked: torch.Tensor | int,
    ) -> torch.Tensor:
        """Count what is dispatched and hang the auxiliary losses' gradients on the weights, whose values stay."""
        local_counts_E = torch.bincount(chosen_TK.flatten(), minlength=self.num_experts)
        sizes = torch.tensor([chosen_TK.shape[0], 0], device=chosen_TK.device)
        sizes[1] = unmasked
        summed = torch.cat((local_counts_E, sizes))
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(summed, group=self.tp_cp_group)
        counts_E, (tokens, loss_tokens) = summed[:-2].to(probabilities_TE.dtype), summed[-2:].to(probabilities_TE.dtype)
        # Each rank holds its own tokens' share of both losses; the gradients add up over the ranks.
        balance = balance_loss(probabilities_TE.sum(0), counts_E, tokens, self.top_k)
        z_loss = torch.logsumexp(logits_TE, dim=-1).square().sum() / tokens
        self.dispatched += local_counts_E
        self.losses += torch.stack((balance, z_loss)).detach() * loss_tokens
        rules = self.rules
        if rules.balance_coefficient or rules.z_loss_coefficient:
            auxiliary = rules.balance_coefficient * balance + rules.z_loss_coefficient * z_loss
            weights_TK = MoEAuxLossAutoScaler.apply(weights_TK, auxiliary * loss_tokens)
        return weights_TK

    def reset_statistics(self) -> None:
        """Forget counts and losses; called at the start of a step."""
        self.dispatched.zero_()
        self.losses.zero_()
