"""Qwen3-MoE with a grouped router, for transformers 5; it travels with the checkpoint (`trust_remote_code=True`).

Everything but the router is transformers' own. Router logits are computed in fp32 from the hidden states and the weight cast to
fp32 (stock Qwen3-MoE computes them in the model's dtype), as the model was trained.
"""

from functools import wraps
from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.utils import can_return_tuple

from .configuration_qwen3_moe_grouped import Qwen3MoeGroupedConfig

# Files hold one tensor an expert, as Qwen3-MoE's do; transformers stacks them while loading and splits them while saving.
register_checkpoint_conversion_mapping("qwen3_moe_grouped", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


# ---- routing: begin (text of moexpand/base/routing.py and moexpand/upcycle/model_code/shared.py)
def select_experts(scores_TE: torch.Tensor, top_k: int, groups: int = 1) -> torch.Tensor:
    """The K / G best experts of every group; equal scores go to the lowest index.

    Args:
        scores_TE: [T, E], any float dtype.
        top_k: K, a multiple of `groups`.
        groups: G, a divisor of E; group g holds the experts g*M ... g*M + M - 1. One group is plain top-k.

    Returns:
        int64 [T, K]; columns in order of the groups, inside a group from the best down.
    """
    scores_TGM = scores_TE.detach().unflatten(1, (groups, -1))
    per_group = top_k // groups
    if per_group == 1:
        picks = scores_TGM.argmax(-1, keepdim=True)
    else:
        # torch.topk leaves the order of equal scores open; a stable sort keeps the lowest index first.
        picks = scores_TGM.sort(dim=-1, descending=True, stable=True).indices[..., :per_group]
    first_of_group = torch.arange(groups, device=scores_TE.device) * scores_TGM.shape[-1]
    return (picks + first_of_group[:, None]).flatten(1)


def route(
    logits_TE: torch.Tensor,
    top_k: int,
    groups: int = 1,
    renormalise: bool = True,
    scaling_factor: float = 1.0,
    gradient: str = "topk",
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Route tokens: p = softmax(z) over all experts, the best K / G of every group, weights p_i / sum of the chosen p.

    The forward value is the same for both gradients. With S the chosen set and g_i = dL/dweight_i:

    * `topk`: the derivative of the formula above; experts outside S get none.
    * `ste`: straight-through (Intern-S1-Pro, arXiv 2603.25040, section 2.2). The backward pass treats the weight as
      p^tau_i, p^tau = softmax(z / tau) over all experts, so that every logit j gets
      dL/dz_j = p^tau_j / tau * ([j in S] g_j - sum_{i in S} g_i p^tau_i).

    Args:
        logits_TE: z, [T, E]. Computed in fp32 or wider.
        top_k: K.
        groups: G; 1 is plain top-k.
        renormalise: divide the chosen probabilities by their sum (`norm_topk_prob` of the checkpoint).
        scaling_factor: multiplies the weights.
        gradient: `topk` or `ste`.
        temperature: tau of `ste`.

    Returns:
        weights [T, K] and probabilities [T, E] in fp32 (float64 for float64 logits), chosen experts int64 [T, K] between.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    probabilities_TE = torch.softmax(logits_TE, dim=-1)
    chosen_TK = select_experts(probabilities_TE, top_k, groups)
    weights_TK = probabilities_TE.gather(1, chosen_TK)
    if gradient == "ste":
        surrogate_TK = weights_TK if temperature == 1.0 else torch.softmax(logits_TE / temperature, -1).gather(1, chosen_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if gradient == "ste":
        weights_TK = weights_TK.detach() + (surrogate_TK - surrogate_TK.detach())
    return weights_TK * scaling_factor, chosen_TK, probabilities_TE


def balance_loss(
    probability_sums_E: torch.Tensor, counts_E: torch.Tensor, tokens: torch.Tensor | int, top_k: int
) -> torch.Tensor:
    """Switch balance loss, E / (T*K) * sum_e n_e * mean_t p_te; 1 when the load is uniform (arXiv 2101.03961, section 2.2).

    Args:
        probability_sums_E: sum over the tokens of the router's probabilities, with gradient.
        counts_E: n_e, how many tokens were really sent to each expert, without gradient.
        tokens: T, the number of tokens behind both.
        top_k: K.
    """
    experts = counts_E.shape[0]
    return (probability_sums_E * counts_E).sum() * experts / (tokens * tokens * top_k)


def fp32_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] in fp32 or wider, whatever the model's dtype and autocast are."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    with torch.autocast(device_type=x_TH.device.type, enabled=False):
        return torch.nn.functional.linear(x_TH.to(wide), weight_EH.to(wide))


def grouped_balance_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, groups: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch balance loss over all layers, on transformers' scale (top_k at a uniform load), counting the experts visited.

    Args:
        router_logits: [tokens, experts] of every layer.
        attention_mask: [batch, tokens]; zeros are left out.
    """
    logits = torch.cat([layer.to(router_logits[0].device) for layer in router_logits]).float()
    counted = torch.ones(len(logits), device=logits.device)
    if attention_mask is not None:
        counted = attention_mask.reshape(-1).to(counted).repeat(len(router_logits))
    _, chosen, probabilities = route(logits, top_k, groups)
    counts = torch.zeros(logits.shape[1], device=logits.device).index_add(0, chosen.flatten(), counted.repeat_interleave(top_k))
    return balance_loss((probabilities * counted[:, None]).sum(0), counts, counted.sum(), top_k) * top_k


# ---- routing: end


class Qwen3MoeGroupedRouter(Qwen3MoeTopKRouter):
    """The best top_k / groups experts of every group of consecutive experts."""

    def __init__(self, config: Qwen3MoeGroupedConfig) -> None:
        super().__init__(config)
        self.groups = config.router_n_groups

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = fp32_logits(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, chosen, _ = route(logits, self.top_k, self.groups, renormalise=self.norm_topk_prob)
        return logits, weights.to(hidden_states.dtype), chosen


class Qwen3MoeGroupedPreTrainedModel(Qwen3MoePreTrainedModel):
    config: Qwen3MoeGroupedConfig
    config_class = Qwen3MoeGroupedConfig
    # transformers looks into this file for the decorator that lets experts run as one grouped product; it stands in qwen3_moe,
    # where the experts are.
    _can_set_experts_implementation_cached_value = True


class Qwen3MoeGroupedModel(Qwen3MoeGroupedPreTrainedModel, Qwen3MoeModel):
    def __init__(self, config: Qwen3MoeGroupedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp.gate = Qwen3MoeGroupedRouter(config)
        self.post_init()


class Qwen3MoeGroupedForCausalLM(Qwen3MoeGroupedPreTrainedModel, Qwen3MoeForCausalLM):
    def __init__(self, config: Qwen3MoeGroupedConfig) -> None:
        super().__init__(config)
        self.model = Qwen3MoeGroupedModel(config)
        # The stock balance loss counts a plain top-k of the logits; this model visits other experts, so `forward` adds its own.
        self.router_aux_loss_coef = 0.0
        self.post_init()

    @can_return_tuple
    @wraps(Qwen3MoeForCausalLM.forward)  # generation decides by the signature what it computes and hands over
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = super().forward(
            input_ids, attention_mask, *args, labels=labels, output_router_logits=wanted, **kwargs, return_dict=True
        )
        if wanted:
            outputs.aux_loss = grouped_balance_loss(
                outputs.router_logits, self.num_experts_per_tok, self.config.router_n_groups, attention_mask
            )
            if labels is not None:
                outputs.loss = outputs.loss + self.config.router_aux_loss_coef * outputs.aux_loss.to(outputs.loss.device)
        return outputs


__all__ = ["Qwen3MoeGroupedForCausalLM", "Qwen3MoeGroupedModel", "Qwen3MoeGroupedPreTrainedModel"]
