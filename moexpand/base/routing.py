"""Grouped top-k routing: which experts a token visits, with what weight, and what gradient the router gets.

Plain torch, no state. The Megatron router, calibration and the tests call these functions, and the model code that is
exported with a child carries them as text.

Legend: T tokens, E experts, G groups, M = E / G experts of a group, K experts a token visits (K / G in every group).
"""

import torch


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
