"""How a decoder knows positions, from its config: RoPE, interleaved MRoPE (Qwen3-VL), FoPE (Intern-S1-Pro)."""

import math
from typing import Any

from moexpand.base.errors import InputError

FOPE_KEYS = ("fope_init_factor", "fope_sep_head", "num_inv_freq")
"""A config in whose rope rules one of these has a value means Fourier position embedding."""


def rope_rules(text: dict[str, Any]) -> dict[str, Any]:
    """The rules of rotary embedding of a decoder's config, from either form (`rope_scaling`, `rope_parameters`)."""
    rules = {"rope_theta": text.get("rope_theta")} | (text.get("rope_scaling") or {}) | (text.get("rope_parameters") or {})
    return {key: value for key, value in rules.items() if value is not None}


def mrope_section(rules: dict[str, Any], usual: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Frequencies of each axis of interleaved MRoPE.

    Args:
        usual: what a family's config that does not say so means; empty: its positions have one axis.

    Raises:
        InputError: not three numbers, or axes that follow each other in blocks as in older models.
    """
    if not usual:
        return ()
    section = rules.get("mrope_section", list(usual))
    if not isinstance(section, list | tuple) or len(section) != 3 or any(type(size) is not int or size < 0 for size in section):
        raise InputError(f"{where} has mrope_section={section!r}; three whole numbers (time, height, width) are needed.")
    if rules.get("mrope_interleaved", True) is not True:
        raise InputError(f"{where} has mrope_interleaved={rules['mrope_interleaved']!r}; only true is supported.")
    return tuple(section)


def fope_frequencies(rules: dict[str, Any], theta: float, max_positions: int, head_dim: int, where: str) -> int:
    """Rotary frequencies that Fourier position embedding keeps (arXiv 2412.17739), 0 for a model without it.

    Kept are the first `num_inv_freq`, or those that turn at least once within the longest sequence.
    """
    if not any(key in rules for key in FOPE_KEYS):
        return 0
    told = rules.get("num_inv_freq")
    if told is not None and (type(told) is not int or not 1 <= told <= head_dim // 2):
        raise InputError(f"{where} has num_inv_freq={told!r}; a whole number from 1 to {head_dim // 2} is needed.")
    slowest = 2 * math.pi / max_positions
    return told or sum(theta ** (-2 * pair / head_dim) > slowest for pair in range(head_dim // 2))
