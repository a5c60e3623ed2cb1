"""Intern-S1-Pro for transformers 5; it travels with checkpoints that are written here (`trust_remote_code=True`).

Tower, projector and decoder layers are transformers' own of Qwen3-VL-MoE. What differs: the router takes the best experts of
every group, by logits in fp32; positions have one axis and may be Fourier positions with tables of each head; no DeepStack.
"""

import math
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    Qwen3VLMoePreTrainedModel,
    Qwen3VLMoeTextAttention,
    Qwen3VLMoeTextModel,
    Qwen3VLMoeTextSparseMoeBlock,
    Qwen3VLMoeTextTopKRouter,
    Qwen3VLMoeVisionModel,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from .configuration_interns1_pro_moexpand import InternS1ProConfig, InternS1ProTextConfig

# Files hold one tensor an expert and matrix, as Qwen3-MoE's do.
register_checkpoint_conversion_mapping("interns1_pro", [*get_checkpoint_conversion_mapping("qwen3_moe")], overwrite=True)


# ---- routing: begin (text of moexpand/base/routing.py and moexpand/upcycle/model_code/shared.py)
def router_probabilities(logits_TE: torch.Tensor, scoring: str = "softmax") -> torch.Tensor:
    """Probabilities over all experts [T, E]: a(z_e) / sum_j a(z_j), with a = exp (`softmax`) or logistic (`sigmoid`)."""
    if scoring == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    scores_TE = torch.sigmoid(logits_TE)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


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
    per_group, size = top_k // groups, scores_TGM.shape[-1]
    if per_group == 1:
        picks = scores_TGM.argmax(-1, keepdim=True)
    elif scores_TE.device.type == "cpu":
        # torch.topk leaves the order of equal scores open, so the few rows that have any are sorted.
        values, picks = scores_TGM.topk(per_group, dim=-1)
        contenders_TG = (scores_TGM >= values[..., -1:]).sum(-1)
        tied_TG = (contenders_TG != per_group) | (values[..., 1:] == values[..., :-1]).any(-1)
        if tied_TG.any():
            picks[tied_TG] = scores_TGM[tied_TG].sort(dim=-1, descending=True, stable=True).indices[:, :per_group]
    else:
        # Looking for ties would make the host wait for the GPU; a stable sort keeps the lowest index first.
        picks = scores_TGM.sort(dim=-1, descending=True, stable=True).indices[..., :per_group]
    first_of_group = torch.arange(groups, device=scores_TE.device) * size
    return (picks + first_of_group[:, None]).flatten(1)


def route(
    logits_TE: torch.Tensor,
    top_k: int,
    groups: int = 1,
    renormalise: bool = True,
    scaling_factor: float = 1.0,
    gradient: str = "topk",
    temperature: float = 1.0,
    normalised: bool = False,
    scoring: str = "softmax",
    bias_E: torch.Tensor | None = None,
    chosen_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Route tokens: scores over all experts, the best K / G of every group, weights score_i / sum of the chosen scores.

    The scores are p = softmax(z) or the logistic function of z. The forward value is the same for every gradient. With S the
    chosen set, g_i = dL/dweight_i, p^tau the probabilities of z / tau over all experts, s^tau = sum_{i in S} p^tau_i and
    w the sum of the chosen weights (1, or the sum of the chosen scores without `renormalise`; the scaling factor aside):

    * `topk`: the derivative of the formula above; experts outside S get none.
    * `ste`: straight-through (Intern-S1-Pro, arXiv 2603.25040, section 2.2). The backward pass treats the weight as p^tau_i,
      so that every logit j gets, for softmax, dL/dz_j = p^tau_j / tau * ([j in S] g_j - sum_{i in S} g_i p^tau_i).
      `normalised` multiplies this by w / s^tau, a constant of the token, as if the chosen p^tau_i added up to what the
      weights do: the gradient then has the magnitude of `topk` (and is that of `topk` at tau = 1 without `renormalise`).
    * `default_vector`: the normalised `ste`. What makes it dense lies in the layer's output: see `unpicked_shares`.

    Args:
        logits_TE: z, [T, E]. Computed in fp32 or wider.
        top_k: K.
        groups: G; 1 is plain top-k.
        renormalise: divide the chosen scores by their sum (`norm_topk_prob` of the checkpoint).
        scaling_factor: multiplies the weights.
        gradient: `topk`, `ste` or `default_vector`.
        temperature: tau.
        normalised: multiply the gradient of `ste` by w / s^tau.
        scoring: `softmax` or `sigmoid`.
        bias_E: added to the scores for the choice alone (loss-free balancing, arXiv 2408.15664); no gradient.
        chosen_TK: experts to visit instead of choosing them (replay), int64, columns in any order.

    Returns:
        weights [T, K] and probabilities [T, E] in fp32 (float64 for float64 logits), chosen experts int64 [T, K] between.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    probabilities_TE = router_probabilities(logits_TE, scoring)
    scores_TE = probabilities_TE if scoring == "softmax" else torch.sigmoid(logits_TE)
    if chosen_TK is None:
        # Scores rise with the logits, which are equal exactly where they should be.
        keys_TE = logits_TE.detach()
        if bias_E is not None:
            # The last bit of a CPU's logistic function depends on the place in the row, so it is rounded from float64.
            keys_TE = (torch.sigmoid(keys_TE.double()).to(keys_TE) if scoring == "sigmoid" else scores_TE.detach()) + bias_E
        chosen_TK = select_experts(keys_TE, top_k, groups)
    if renormalise:
        # score_i / sum of the chosen scores, also where these are too small for a float
        chosen_logits_TK = logits_TE.gather(1, chosen_TK)
        weights_TK = torch.softmax(
            chosen_logits_TK if scoring == "softmax" else torch.nn.functional.logsigmoid(chosen_logits_TK), dim=-1
        )
    else:
        weights_TK = scores_TE.gather(1, chosen_TK)
    if gradient != "topk":
        surrogate_TE = probabilities_TE if temperature == 1.0 else router_probabilities(logits_TE / temperature, scoring)
        surrogate_TK = surrogate_TE.gather(1, chosen_TK)
        if normalised or gradient == "default_vector":
            smallest = torch.finfo(surrogate_TK.dtype).tiny
            total_T1 = surrogate_TK.new_ones(1) if renormalise else weights_TK.detach().sum(-1, keepdim=True).clamp(min=smallest)
            surrogate_TK = surrogate_TK * (total_T1 / surrogate_TK.detach().sum(-1, keepdim=True).clamp(min=smallest))
        weights_TK = weights_TK.detach() + (surrogate_TK - surrogate_TK.detach())
    return weights_TK * scaling_factor if scaling_factor != 1.0 else weights_TK, chosen_TK, probabilities_TE


def unpicked_shares(
    logits_TE: torch.Tensor,
    chosen_TK: torch.Tensor,
    renormalise: bool = True,
    scaling_factor: float = 1.0,
    temperature: float = 1.0,
    scoring: str = "softmax",
) -> torch.Tensor:
    """What experts outside the chosen set S would weigh, for the gradient `default_vector`: q_j = w p^tau_j / s^tau, 0 inside S.

    An expert that a token did not visit is represented by m_j, a moving average of its outputs (after arXiv 2504.12463, which
    also adds it to the forward value; here the forward value stays what serving engines compute). The backward pass
    treats the layer's output as y + sum_{j not in S} q_j m_j. Together with `route`, and with g_j = <dL/dy, E_j(x)> for
    j in S and <dL/dy, m_j> elsewhere, every logit gets, for softmax,

        dL/dz_j = w p^tau_j / (tau s^tau) * (g_j - sum_{all i} g_i p^tau_i)

    which says of every expert whether it would have been better than the mixture. With m = 0 it is the normalised `ste`.
    Without `renormalise` and at tau = 1, q_j = p_j is exactly what expert j would weigh.

    Returns:
        [T, E] in fp32 (float64 for float64 logits); w / s^tau is a constant in the backward pass.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    surrogate_TE = router_probabilities(logits_TE / temperature if temperature != 1.0 else logits_TE, scoring)
    smallest = torch.finfo(surrogate_TE.dtype).eps
    mass_T1 = surrogate_TE.detach().gather(1, chosen_TK).sum(-1, keepdim=True).clamp(min=smallest)
    factor_T1 = scaling_factor / mass_T1
    if not renormalise:
        scores_TE = torch.sigmoid(logits_TE) if scoring == "sigmoid" else router_probabilities(logits_TE)
        factor_T1 = factor_T1 * scores_TE.detach().gather(1, chosen_TK).sum(-1, keepdim=True).clamp(min=smallest)
    return (surrogate_TE * factor_T1).scatter(1, chosen_TK, 0.0)


def group_probabilities(logits_TE: torch.Tensor, groups: int, scoring: str = "softmax") -> torch.Tensor:
    """Probabilities inside every group, [T, E]: they sum to 1 over the experts of a group."""
    logits_TGM = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).unflatten(1, (groups, -1))
    return router_probabilities(logits_TGM, scoring).flatten(1)


def balance_loss(
    probability_sums_E: torch.Tensor, counts_E: torch.Tensor, tokens: torch.Tensor | int, top_k: int, groups: int = 1
) -> torch.Tensor:
    """Switch balance loss, E / (T*K) * sum_e n_e * mean_t p_te; 1 when the load is uniform (arXiv 2101.03961, section 2.2).

    With `groups` and probabilities inside groups it is the mean over the groups of the same loss inside each.

    Args:
        probability_sums_E: sum over the tokens of the router's probabilities, with gradient.
        counts_E: n_e, how many tokens were really sent to each expert, without gradient.
        tokens: T, the number of tokens behind both.
        top_k: K.
        groups: 1, or G where the probabilities are those of `group_probabilities`.
    """
    experts = counts_E.shape[0]
    return (probability_sums_E * counts_E).sum() * experts / (tokens * tokens * top_k * groups)


def selection_bias_step(counts_E: torch.Tensor, groups: int, rate: float) -> torch.Tensor:
    """Change of the selection bias after a step: rate * sign(mean load of the group - load) (arXiv 2408.15664, algorithm 1).

    Args:
        counts_E: token copies that the step sent to each expert.
        rate: in units of a score.
    """
    counts_GM = counts_E.unflatten(0, (groups, -1))
    return rate * torch.sign(counts_GM.mean(-1, keepdim=True) - counts_GM).flatten()


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


class InternS1ProRouter(Qwen3VLMoeTextTopKRouter):
    """The best top_k / groups experts of every group of consecutive experts."""

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__(config)
        self.groups = config.router_n_groups

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = fp32_logits(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, chosen, _ = route(logits, self.top_k, self.groups)
        return logits, weights.to(hidden_states.dtype), chosen


class InternS1ProPositions(nn.Module):
    """Cosines and sines [batch, 1 or key/value heads, tokens, head_dim] of positions, rotary or Fourier (arXiv 2412.17739).

    Fourier positions keep the frequencies that turn at least once within `max_position_embeddings` (or the first `num_inv_freq`)
    and mix them: table = sines @ coefficients, and the same for cosines; the pairs that are left get 1 in both.
    """

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__()
        rules = config.rope_parameters
        self.theta, self.width, self.kept = rules["rope_theta"], config.head_dim, config.head_dim // 2
        self.fourier = any(rules.get(key) is not None for key in ("fope_init_factor", "fope_sep_head", "num_inv_freq"))
        if self.fourier:
            slowest = 2 * math.pi / config.max_position_embeddings
            turning = sum(self.theta ** (-2 * pair / self.width) > slowest for pair in range(self.kept))
            self.kept = rules.get("num_inv_freq") or turning
            heads = (config.num_key_value_heads,) if rules.get("fope_sep_head") else ()
            for name in ("sin_coef", "cos_coef"):
                self.register_buffer(name, torch.eye(self.kept).expand(*heads, self.kept, self.kept).clone())

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = position_ids[0] if position_ids.ndim == 3 else position_ids
        with torch.autocast(device_type=x.device.type, enabled=False):
            pairs = torch.arange(0, 2 * self.kept, 2, device=x.device).float()
            angles = (positions[..., None].float() * (1.0 / self.theta ** (pairs / self.width)))[:, None]
            tables = [angles.cos(), angles.sin()]
            if self.fourier:
                left = self.width // 2 - angles.shape[-1]
                mixed = [table @ mix.float() for table, mix in zip(tables, (self.cos_coef, self.sin_coef), strict=True)]
                tables = [nn.functional.pad(table, (0, left), value=1.0) for table in mixed]
            cosines, sines = (torch.cat((table, table), dim=-1).to(x.dtype) for table in tables)
        return cosines, sines


def turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Queries or keys [batch, heads, tokens, width], each head by the tables of its own key/value head."""
    groups = cosines.shape[1]
    grouped = heads.unflatten(1, (groups, -1))
    first, second = grouped.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    return (grouped * cosines[:, :, None] + crossed * sines[:, :, None]).flatten(1, 2)


class InternS1ProAttention(Qwen3VLMoeTextAttention):
    """The stock attention with tables of each key/value head."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim))

        query = turned(self.q_norm(heads(self.q_proj(hidden_states))).transpose(1, 2), *position_embeddings)
        key = turned(self.k_norm(heads(self.k_proj(hidden_states))).transpose(1, 2), *position_embeddings)
        value = heads(self.v_proj(hidden_states)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2).contiguous()), weights


class InternS1ProPreTrainedModel(Qwen3VLMoePreTrainedModel):
    config: InternS1ProConfig
    config_class = InternS1ProConfig
    # transformers looks into this file for the decorator that lets experts run as one grouped product; it stands in qwen3_vl_moe,
    # where the experts are.
    _can_set_experts_implementation_cached_value = True
    _keep_in_fp32_modules_strict = ("rotary_emb",)
    _keys_to_ignore_on_load_unexpected = [r"^model\.time_series\."]  # noqa: RUF012 (not computed here; their places are refused)


class InternS1ProTextModel(InternS1ProPreTrainedModel, Qwen3VLMoeTextModel):
    config: InternS1ProTextConfig
    config_class = InternS1ProTextConfig

    def __init__(self, config: InternS1ProTextConfig) -> None:
        super().__init__(config)
        self.rotary_emb = InternS1ProPositions(config)
        for number, layer in enumerate(self.layers):
            layer.self_attn = InternS1ProAttention(config, number)
            if isinstance(layer.mlp, Qwen3VLMoeTextSparseMoeBlock):
                layer.mlp.gate = InternS1ProRouter(config)
        self.post_init()


class InternS1ProModel(InternS1ProPreTrainedModel, Qwen3VLMoeModel):
    def __init__(self, config: InternS1ProConfig) -> None:
        super(Qwen3VLMoeModel, self).__init__(config)  # the stock one finds no class for parts of these types
        self.visual = Qwen3VLMoeVisionModel._from_config(config.vision_config)
        self.language_model = InternS1ProTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def compute_3d_position_ids(self, *args: Any, **kwargs: Any) -> None:
        """Positions have one axis: pictures stand at consecutive ones, as text does, and the decoder counts them itself."""


class InternS1ProForConditionalGeneration(InternS1ProPreTrainedModel, Qwen3VLMoeForConditionalGeneration):
    _prepare_position_ids_for_generation = GenerationMixin._prepare_position_ids_for_generation

    def __init__(self, config: InternS1ProConfig) -> None:
        super(Qwen3VLMoeForConditionalGeneration, self).__init__(config)  # as above
        self.model = InternS1ProModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @wraps(Qwen3VLMoeForConditionalGeneration.forward)  # generation decides by the signature what it computes and hands over
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        text, place = self.config.text_config, getattr(self.config, "ts_token_id", None)
        if place is not None and input_ids is not None and (input_ids == place).any():
            raise ValueError(f"The tokens hold {place}, a place for a time series, which this model code does not compute.")
        wanted = text.output_router_logits if output_router_logits is None else output_router_logits
        # The stock balance loss counts a plain top-k of the logits; this model visits others, so both losses are made here.
        own = {"labels": None if wanted else labels, "output_router_logits": wanted, "return_dict": True}
        outputs = super().forward(input_ids, attention_mask, *args, **own, **kwargs)
        if wanted:
            top_k, groups = text.num_experts_per_tok, text.router_n_groups
            outputs.aux_loss = grouped_balance_loss(outputs.router_logits, top_k, groups, attention_mask)
            if labels is not None:
                loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
                outputs.loss = loss + text.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
        return outputs


__all__ = [
    "InternS1ProForConditionalGeneration",
    "InternS1ProModel",
    "InternS1ProPreTrainedModel",
    "InternS1ProTextModel",
]
