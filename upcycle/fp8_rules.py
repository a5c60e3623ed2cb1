"""Which tensors of a model are block-FP8 when it is written in FP8, and how config.json says so: as in the released format.

All linears of the decoder are: attention's four and the experts' three. Router, norms, embedding, head, tables of positions,
towers and encoders are not.
"""

import re
from collections.abc import Iterable
from typing import Any

from moexpand.upcycle.tensors import BLOCK

WEIGHT, SCALES = "float8_e4m3fn", "float32"
"""Formats that are written; scales are powers of two in fp32, which every reader takes."""

_LINEAR = re.compile(r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)\.weight$")
_ELSEWHERE = (".visual.", ".time_series.")
"""Parts that have layers of their own."""


def quantised(name: str) -> bool:
    """Whether a tensor of a split file is written in FP8."""
    return _LINEAR.search(name) is not None and not any(part in name for part in _ELSEWHERE)


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a model with these tensors (of a split file)."""
    kept = dict.fromkeys(name.rpartition(".")[0] for name in names if not quantised(name))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(kept),
    }
