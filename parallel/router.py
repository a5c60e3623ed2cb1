"""The router inside Megatron-Core: routing maths of base/routing.py, auxiliary losses, replay, counts of what was dispatched.

Legend: T tokens of this rank, E experts, K chosen, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from moexpand.base.routing import route, selection_bias_step, unpicked_shares
from moexpand.parallel.balance import BalanceLosses, Routing
from moexpand.parallel.replay import Routes
from moexpand.parallel.shape import ModelShape, RouterRules


@dataclass(frozen=True)
class Choice:
    """What a router hands to the layer.

    Attributes:
        weights: [T, K] in fp32 or wider.
        chosen: int64 [T, K], columns in order of the groups.
        shares: [T, E], for the gradient `default_vector` (`unpicked_shares`); None otherwise.
    """

    weights: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor | None


class GroupedRouter(Router):
    """Top-(K/G) in every group, weights and gradient by `moexpand.base.routing.route`, logits in fp32 or wider.

    Every token carries a tag, twice its number in the step's stream of micro-batches, plus one where its loss does not count.
    Tags travel with the hidden states in the place of Megatron-Core's padding mask: through recomputation, pipeline schedules and
    the splits of tensor and context parallelism. By them routes are recorded and replayed.

    Attributes:
        observer: outside training it is told the decoder layer, logits [T, E] and chosen experts [T, K].
        routes: records or replays, where set.
        statistics: a hook of the telemetry, told hidden states, logits, probabilities and choice of every training forward pass.
    """

    def __init__(self, *, config: TransformerConfig, pg_collection: Any, shape: ModelShape, rules: RouterRules) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.shape, self.rules, self.groups = shape, rules, shape.router_n_groups
        self.observer: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        self.routes: Routes | None = None
        self.statistics: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self.dispatched: torch.Tensor
        self.losses: torch.Tensor
        self.previous: torch.Tensor
        self.selection_bias: torch.Tensor
        experts = shape.num_experts
        self.register_buffer("dispatched", torch.zeros(experts, dtype=torch.float64), persistent=False)
        self.register_buffer("losses", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("previous", torch.ones(experts, dtype=torch.float64))
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32))
        if rules.freeze:
            # The gradient is zero instead of absent: overlapped reductions wait for every parameter's.
            self.weight.register_hook(torch.zeros_like)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron-Core's number of the decoder layer, 1-based; called once after construction."""
        super().set_layer_number(layer_number)
        factors, rules = self.rules.layer_factors, self.rules
        factor = factors[layer_number - 1] if factors else 1.0
        top_k, scoring = self.shape.num_experts_per_tok, self.shape.scoring_func
        self.balance = BalanceLosses(rules, top_k, self.groups, scoring, self.tp_cp_group, factor)

    @property
    def layer(self) -> int:
        """The decoder layer, 0-based."""
        return self.layer_number - 1

    def forward(self, tokens_TH: torch.Tensor, tags_T: torch.Tensor) -> Choice:
        """Route hidden states [T, H] with their tags int64 [T]."""
        shape, rules = self.shape, self.rules
        wide = torch.promote_types(tokens_TH.dtype, torch.float32)
        logits = torch.nn.functional.linear(tokens_TH.to(wide), self.weight.to(wide))
        replayed = None if self.routes is None else self.routes.look_up(self.layer, tags_T >> 1)
        weights_TK, chosen_TK, probabilities_TE = route(
            logits,
            shape.num_experts_per_tok,
            self.groups,
            shape.norm_topk_prob,
            shape.routed_scaling_factor,
            gradient=rules.gradient,
            temperature=rules.temperature,
            normalised=rules.normalised,
            scoring=shape.scoring_func,
            bias_E=self.selection_bias if shape.selection_bias else None,
            chosen_TK=replayed,
        )
        if self.routes is not None and replayed is None:
            self.routes.note(self.layer, tags_T >> 1, chosen_TK)
        shares_TE = None
        if self.training and torch.is_grad_enabled():
            routing = Routing(logits, probabilities_TE, chosen_TK, tags_T & 1 == 0)
            weights_TK = self._with_auxiliary_losses(weights_TK, routing)
            if rules.gradient == "default_vector":
                shares_TE = self._shares(logits, chosen_TK)
            if self.statistics is not None:
                self.statistics(tokens_TH.detach(), logits.detach(), probabilities_TE.detach(), chosen_TK)
        if self.observer is not None and not self.training:
            self.observer(self.layer, logits, chosen_TK)
        return Choice(weights_TK, chosen_TK, shares_TE)

    def _shares(self, logits: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """What the experts outside the choice would weigh."""
        shape = self.shape
        return unpicked_shares(
            logits, chosen_TK, shape.norm_topk_prob, shape.routed_scaling_factor, self.rules.temperature, shape.scoring_func
        )

    def routing(self, logits: torch.Tensor) -> torch.Tensor:
        """Part of Megatron-Core's protocol, which this router has no use for."""
        raise NotImplementedError

    def _with_auxiliary_losses(self, weights_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Count what is dispatched and hang the auxiliary losses' gradients on the weights, whose values stay."""
        counts_E = torch.bincount(routing.chosen.flatten(), minlength=self.num_experts)
        losses, weighted = self.balance(routing, counts_E, self.previous)
        self.dispatched += counts_E
        self.losses += losses
        return weights_TK if weighted is None else MoEAuxLossAutoScaler.apply(weights_TK, weighted)

    def reset_statistics(self) -> None:
        """Forget counts and losses; called at the start of a step."""
        self.dispatched.zero_()
        self.losses.zero_()

    def end_step(self, dispatched_E: torch.Tensor) -> None:
        """Remember the step's load over all ranks, float64 [E], and move the selection bias against it."""
        self.previous.copy_(dispatched_E)
        if self.rules.bias_rate:
            self.selection_bias += selection_bias_step(self.previous, self.groups, self.rules.bias_rate).float()
