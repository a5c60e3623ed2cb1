"""What every modelling file carries besides the functions of moexpand/base/routing.py; `generate` inserts both as text."""

import torch

from moexpand.base.routing import balance_loss, route


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
