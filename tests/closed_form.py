"""What a child computes before training, in float64 numpy from its parent's tensors alone.

The formulas are those of the expansion: with the parents C_g visible in group g, the group picks e_g = argmax over C_g of the
parent's logits z, and y = sum_g beta_g f_{e_g} with beta = softmax(z_{e_0}, ..., z_{e_{G-1}}). With several picks a group, they
are its K / G best slots, of equal ones the lowest.

Legend: T tokens, H hidden, D head_dim, E parents, S slots.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

Weights = dict[str, np.ndarray]
Pick = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From a token's router logits to the parent's experts that are picked and their weights; an expert may come several times."""


def weights_of(folder: Path) -> Weights:
    """All tensors of a folder in float64, read by the safetensors library."""
    return {
        name: value.to(torch.float64).numpy()
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def groups_of(placement: str, experts: int = 128) -> list[list[int]]:
    """The parents visible in each of 8 groups, from the definitions."""
    if placement == "halves_tile":
        return [list(range(experts // 2)), list(range(experts // 2, experts))] * 4
    return [[e for e in range(experts) if (e >> bit & 1) == side] for bit in range(4) for side in (0, 1)]


def grouped_pick(placement: str | Sequence[int], groups: int = 8, top_k: int = 8) -> Pick:
    """The closed form of a child of copies, from the parent's logits [E].

    Args:
        placement: `halves_tile` or `halves_bits`, or the parent of every slot.
        groups, top_k: of the child, when slots are given.
    """
    if not isinstance(placement, str):
        return lambda logits: slot_pick(placement, groups, top_k)(logits[list(placement)])
    members = groups_of(placement)

    def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.array([max(group, key=lambda expert: logits[expert]) for group in members])
        return chosen, softmax(logits[chosen])

    return pick


def slot_pick(slot_to_parent: Sequence[int], groups: int, top_k: int) -> Pick:
    """The same from the logits [S] of the child's own router rows, which may differ from their parents'."""
    size = len(slot_to_parent) // groups

    def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots: list[int] = []
        for group in range(groups):
            own = range(group * size, (group + 1) * size)
            slots += sorted(own, key=lambda slot: (-logits[slot], slot))[: top_k // groups]
        return np.array([slot_to_parent[slot] for slot in slots]), softmax(logits[slots])

    return pick


def top_pick(top_k: int) -> Pick:
    """The parent's own routing: the softmax over its best `top_k` logits."""

    def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.argsort(-logits, kind="stable")[:top_k]
        return chosen, softmax(logits[chosen])

    return pick


def expert(weights: Weights, prefix: str, x_H: np.ndarray) -> np.ndarray:
    gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    hidden = gate @ x_H
    return down @ (hidden / (1 + np.exp(-hidden)) * (up @ x_H))


def moe(weights: Weights, layer: int, x_TH: np.ndarray, pick: Pick) -> np.ndarray:
    """A Mixture-of-Experts layer of the parent with another rule of choice, token by token; a dense layer is one expert."""
    prefix = f"model.layers.{layer}.mlp"
    if f"{prefix}.gate.weight" not in weights:
        return np.stack([expert(weights, prefix, x_H) for x_H in x_TH])
    out = np.zeros_like(x_TH)
    for token, x_H in enumerate(x_TH):
        for chosen, weight in zip(*pick(weights[f"{prefix}.gate.weight"] @ x_H), strict=True):
            out[token] += weight * expert(weights, f"{prefix}.experts.{chosen}", x_H)
    return out


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


Turn = Callable[[np.ndarray, int], np.ndarray]
"""Queries or keys [T, D] of a head of a key/value group, turned by their positions 0 ... T - 1."""


def _rotate(x_TD: np.ndarray, theta: float) -> np.ndarray:
    tokens, width = x_TD.shape
    angles = np.arange(tokens)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x_TD[:, : width // 2], x_TD[:, width // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(weights: Weights, config: dict, layer: int, x_TH: np.ndarray, turn: Turn) -> np.ndarray:
    prefix, width = f"model.layers.{layer}.self_attn", config["head_dim"]
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    q, k, v = (x_TH @ weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    future = np.triu(np.full((len(x_TH),) * 2, -np.inf), 1)
    outs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        group = head * kv_heads // heads
        shared = slice(group * width, (group + 1) * width)
        q_TD = turn(_norm(q[:, own], weights[f"{prefix}.q_norm.weight"], eps), group)
        k_TD = turn(_norm(k[:, shared], weights[f"{prefix}.k_norm.weight"], eps), group)
        outs.append(softmax(q_TD @ k_TD.T / np.sqrt(width) + future) @ v[:, shared])
    return np.concatenate(outs, -1) @ weights[f"{prefix}.o_proj.weight"].T


def logits(
    folder: Path,
    tokens: np.ndarray,
    pick: Pick | Sequence[Pick],
    weights: Weights | None = None,
    turn: Turn | None = None,
) -> np.ndarray:
    """Logits [B, S, V] of a hub-form Qwen3-MoE folder whose experts are chosen by `pick`.

    Args:
        tokens: [B, S].
        pick: one for all layers, or one for each.
        weights: other weights than the folder's.
        turn: other positions than plain rotary embedding.
    """
    weights, config = weights or weights_of(folder), json.loads((folder / "config.json").read_text())
    turn = turn or (lambda x_TD, group: _rotate(x_TD, config["rope_theta"]))
    eps, rows = config["rms_norm_eps"], []
    for row in tokens:
        x_TH = weights["model.embed_tokens.weight"][row]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            x_TH = x_TH + _attention(weights, config, layer, _norm(x_TH, weights[f"{prefix}.input_layernorm.weight"], eps), turn)
            own = pick if callable(pick) else pick[layer]
            x_TH = x_TH + moe(weights, layer, _norm(x_TH, weights[f"{prefix}.post_attention_layernorm.weight"], eps), own)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        rows.append(_norm(x_TH, weights["model.norm.weight"], eps) @ head.T)
    return np.stack(rows)
