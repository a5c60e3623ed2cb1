"""The vision tower alone equals transformers' of Qwen3-VL-MoE: features and gradients of every parameter."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from moexpand.parallel.pictures import Grid
from moexpand.parallel.shape import VisionShape
from moexpand.parallel.vision import VisionTower

SIZES: dict[str, Any] = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "in_channels": 3, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 40, "num_position_embeddings": 36,
}  # fmt: skip
GRIDS: list[Grid] = [(1, 4, 6), (1, 2, 2), (1, 6, 4), (1, 10, 2), (2, 4, 4), (1, 4, 6)]
"""Several sizes, one twice, one of two frames, larger and smaller than the square of learned positions (6 x 6)."""


def _pair(deepstack: tuple[int, ...], recompute: bool = False) -> tuple[VisionTower, Qwen3VLMoeVisionModel]:
    theirs = Qwen3VLMoeVisionModel(Qwen3VLMoeVisionConfig(**SIZES, deepstack_visual_indexes=list(deepstack)))
    drawn = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.copy_(noise / fan_in**0.5 if fan_in else ("norm" in name and name.endswith("weight")) + 0.1 * noise)
    shape = VisionShape(**SIZES, image_token_id=0, deepstack_visual_indexes=deepstack)
    ours = VisionTower(shape, torch.float32, recompute)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _pixels(grids: list[Grid]) -> torch.Tensor:
    patches = sum(int(np.prod(grid)) for grid in grids)
    return torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("deepstack", [(), (0, 2), (3, 1)])
@pytest.mark.parametrize("recompute", [False, True])
def test_features_and_gradients_are_those_of_transformers(deepstack: tuple[int, ...], recompute: bool) -> None:
    ours, theirs = _pair(deepstack, recompute)
    pixels = _pixels(GRIDS)
    out = theirs(pixels, grid_thw=torch.tensor(GRIDS))
    due = torch.stack([out.pooler_output, *out.deepstack_features], dim=1)
    found = ours(pixels, GRIDS)
    assert found.shape == (sum(int(np.prod(grid)) for grid in GRIDS) // 4, 1 + len(deepstack), 40)
    assert float((found - due).detach().abs().max()) < 1e-5

    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (due * weights).sum().backward()
    parameters = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == parameters.keys()
    for name, parameter in ours.named_parameters():
        expected = parameters[name].grad
        distance = float((parameter.grad - expected).norm() / expected.norm()) if expected.norm() > 1e-3 else 0.0
        assert distance < 1e-5, (name, distance)


def test_a_picture_has_the_same_features_beside_others_and_alone() -> None:
    tower, _ = _pair((1,))
    pixels = _pixels(GRIDS)
    together, done = tower(pixels, GRIDS), 0
    for number, grid in enumerate(GRIDS):
        patches = int(np.prod(grid))
        alone = tower(pixels[done : done + patches], [grid])
        assert torch.allclose(alone, together[done // 4 : (done + patches) // 4], atol=2e-6), number
        done += patches


def test_bf16_stays_near_and_float64_nearer() -> None:
    tower, _ = _pair((1,))
    pixels = _pixels(GRIDS)
    narrow, wide = (VisionTower(tower.shape, dtype) for dtype in (torch.bfloat16, torch.float64))
    for other in (narrow, wide):
        other.load_state_dict(tower.state_dict())
    due = wide(pixels.double(), GRIDS)
    assert float((tower(pixels, GRIDS) - due).detach().abs().max()) < 2e-5
    assert float(((narrow(pixels, GRIDS) - due).norm() / due.norm()).detach()) < 0.05
