"""The form of routes: which experts every token visited in every layer.

[tokens, layers, K] in the smallest unsigned integer that holds the experts, as serving engines record them (LMDeploy returns
uint16 of this shape), columns in any order.
"""

import numpy as np

from moexpand.base.errors import InputError


def compact(num_experts: int) -> np.dtype:
    """The integers that routes are kept in."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def check_routes(routes: np.ndarray, shape: tuple[int, ...], num_experts: int, groups: int, where: str) -> None:
    """Refuse routes that are not for this model and these tokens.

    Args:
        routes: [..., layers, K].
        shape: what it should be.
        where: what they are, for the sentence.

    Raises:
        InputError: another shape, experts that do not exist, twice the same one, or not K / G of every group.
    """
    if routes.shape != shape:
        raise InputError(f"{where} have the shape {list(routes.shape)}; these tokens and this model need {list(shape)}.")
    if routes.dtype.kind not in "ui" or routes.min(initial=0) < 0 or routes.max(initial=0) >= num_experts:
        raise InputError(f"{where} must be whole numbers from 0 to {num_experts - 1}, one for each expert.")
    top_k = shape[-1]
    ordered = np.sort(routes.astype(np.int32), axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise InputError(f"{where} send a token to the same expert twice.")
    due = np.repeat(np.arange(groups), top_k // groups)
    if groups > 1 and (ordered // (num_experts // groups) != due).any():
        raise InputError(
            f"{where} do not visit {top_k // groups} of every group's {num_experts // groups} experts, as this model's router "
            "does."
        )
