"""DeepStack's rule stands in conf and in the engine, as neither room imports the other: both count layers alike."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from moexpand.base.errors import InputError
from moexpand.conf.check_encoders import check_deepstack
from moexpand.conf.model_schema import VisionModel
from moexpand.conf.train_schema import Parallel
from moexpand.parallel.model import transformer_config
from moexpand.parallel.shape import Layout, ModelShape

SHAPE = ModelShape(
    vocab_size=64, hidden_size=32, num_hidden_layers=24, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pipeline": 2},
        {"pipeline": 2, "interleave": 4},
        {"pipeline": 4, "first_layers": 3},
        {"pipeline": 4, "last_layers": 3},
        {"pipeline": 4, "first_layers": 2, "last_layers": 4},
        {"pipeline": 2, "first_layers": 1, "last_layers": 23},
    ],
    ids=str,
)
def test_the_check_before_the_start_counts_layers_as_megatron_does(layout: dict[str, Any]) -> None:
    config = transformer_config(SHAPE, Layout(**layout), torch.float32)
    layers = get_num_layers_to_build(config, vp_stage=0 if layout.get("interleave", 1) > 1 else None, pp_rank=0)
    takes = [VisionModel(deepstack_visual_indexes=[*range(deep)]) for deep in (layers, layers + 1)]
    check_deepstack(Parallel(**layout), takes[0], SHAPE.num_hidden_layers)
    with pytest.raises(InputError, match=f"the first part has {layers};"):
        check_deepstack(Parallel(**layout), takes[1], SHAPE.num_hidden_layers)
