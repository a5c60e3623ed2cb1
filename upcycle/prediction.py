"""What a child of copies computes at step 0 compared with its parent, from the parent's router logits alone.

A copied slot has its parent's logit, so the child's routing follows from the parent's logits z and the plan's map, without any
weights of the child: the best K / G slots of every group, the softmax over them, and the weights of equal parents added up.
With alpha the parent's weights over its own choice S and beta the child's over the parents that it picked,

    gate mass = sum of alpha over the picked parents
    distinct  = how many parents were picked, at most K
    recall    = how many of them are in S
    TV        = 1/2 sum_e |alpha_e - beta_e|

TV (total variation) orders placements best: gate mass does not see that some parents are weighted too much.

Legend: T tokens, E parents, N slots, G groups, M = N / G, K experts a token visits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from moexpand.base.errors import InputError


@dataclass(frozen=True)
class Closeness:
    """How close a child's routing is to its parent's, means over tokens."""

    gate_mass: float
    """Part of the parent's combine weight that falls on parents the child picked, 0 to 1."""
    distinct: float
    """Different parents among the child's picks, 1 to K."""
    recall: float
    """Parents of the parent's own choice among the child's picks, 0 to K."""
    total_variation: float
    """Total variation between the combine weights of parent and child, 0 (equal) to 1 (disjoint)."""
    top1: float
    """Probability that the parent's best expert is among the picks."""


@dataclass(frozen=True)
class Prediction(Closeness):
    """Means over tokens and layers, and every layer's own."""

    layers: dict[int, Closeness]


def predict(
    logits: Mapping[int, np.ndarray],
    slot_to_parent: Mapping[int, np.ndarray],
    groups: int,
    top_k: int,
    parent_groups: int = 1,
) -> Prediction:
    """Predict the routing of a child of exact copies.

    Equal slots of one group tie, and ties go to the lowest slot. So when a group shows a parent c > 1 times and K / G > 1, one
    parent takes several of the group's picks; `distinct` shows it.

    Args:
        logits: the parent's router logits [T, E] by layer, any float dtype.
        slot_to_parent: parent of every slot, [N], for the same layers (more are ignored).
        groups: G of the child, a divisor of N and of K.
        top_k: K, of parent and child.
        parent_groups: groups of the parent's own router; 1 is plain top-k.

    Raises:
        InputError: no layer at all, or a logit that is not a finite number.
    """
    if not logits:
        raise InputError("The calibration has no router logits, which the prediction of step 0 needs; calibrate again.")
    layers = {
        layer: _closeness(_finite(scores_TE, layer), slot_to_parent[layer], groups, top_k, parent_groups)
        for layer, scores_TE in logits.items()
    }
    means = {name.name: float(np.mean([asdict(one)[name.name] for one in layers.values()])) for name in fields(Closeness)}
    return Prediction(**means, layers=layers)


def _finite(scores_TE: np.ndarray, layer: int) -> np.ndarray:
    if not np.isfinite(scores_TE).all():
        raise InputError(f"The router logits of layer {layer} in the calibration are not all finite; calibrate again.")
    return scores_TE


def _closeness(scores_TE: np.ndarray, parent_of_N: np.ndarray, groups: int, top_k: int, parent_groups: int) -> Closeness:
    parents = scores_TE.shape[1]
    chosen_TK = _picks(scores_TE, top_k, parent_groups)
    picked_TK = np.asarray(parent_of_N)[_picks(scores_TE[:, parent_of_N], top_k, groups)]
    alpha_TE, own_TE = _combined(scores_TE, chosen_TK, parents)
    beta_TE, seen_TE = _combined(scores_TE, picked_TK, parents)
    best_T = scores_TE.argmax(1)
    return Closeness(
        gate_mass=float((alpha_TE * seen_TE).sum(1).mean()),
        distinct=float(seen_TE.sum(1).mean()),
        recall=float((own_TE & seen_TE).sum(1).mean()),
        total_variation=float(0.5 * np.abs(alpha_TE - beta_TE).sum(1).mean()),
        top1=float(seen_TE[np.arange(len(best_T)), best_T].mean()),
    )


def _picks(scores_TN: np.ndarray, top_k: int, groups: int) -> np.ndarray:
    """The best K / G of every group, [T, K]; ties to the lowest index, as `select_experts` of base/routing.py."""
    scores_TGM = scores_TN.reshape(len(scores_TN), groups, -1).astype(np.float64)  # a copy, which the loop writes into
    picks_TGk = np.empty((*scores_TGM.shape[:2], top_k // groups), dtype=np.int64)
    for k in range(top_k // groups):
        best_TG = scores_TGM.argmax(-1)[..., None]
        picks_TGk[..., k : k + 1] = best_TG
        np.put_along_axis(scores_TGM, best_TG, -np.inf, -1)
    first_of_group = np.arange(groups) * scores_TGM.shape[-1]
    return (picks_TGk + first_of_group[:, None]).reshape(len(scores_TN), top_k)


def _combined(scores_TE: np.ndarray, parents_TK: np.ndarray, parents: int) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the picks, summed by parent: weights [T, E] in float64 and whether each parent was picked at all."""
    picked_TK = np.take_along_axis(scores_TE, parents_TK, 1).astype(np.float64)
    weights_TK = np.exp(picked_TK - picked_TK.max(1, keepdims=True))
    weights_TK /= weights_TK.sum(1, keepdims=True)
    cells = (parents_TK + np.arange(len(parents_TK))[:, None] * parents).ravel()
    shape = len(parents_TK), parents
    weights_TE = np.bincount(cells, weights_TK.ravel(), shape[0] * parents).reshape(shape)
    return weights_TE, (np.bincount(cells, minlength=shape[0] * parents) > 0).reshape(shape)
