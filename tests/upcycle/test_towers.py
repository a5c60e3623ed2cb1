"""Vision towers: every name and shape as transformers builds it, and the published totals."""

import math
from typing import Any

import pytest
import torch
from transformers import InternVLConfig, Qwen3VLMoeConfig
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from moexpand.base.errors import InputError
from moexpand.upcycle.safetensors_file import Shape
from moexpand.upcycle.towers import intern_vit, qwen3_vl_tower

QWEN3_VL = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
INTERN_S1_PRO = {key: value for key, value in QWEN3_VL.items() if key != "deepstack_visual_indexes"} | {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
}  # fmt: skip
ODD_QWEN3_VL = {
    "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "in_channels": 4, "patch_size": 6,
    "temporal_patch_size": 3, "spatial_merge_size": 3, "out_hidden_size": 56, "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
INTERN_VIT = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25, "num_channels": 3,
    "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
    "use_mask_token": False, "use_absolute_position_embeddings": True, "use_mean_pooling": True,
}  # fmt: skip
BARE_INTERN_VIT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 1,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip


def shapes_of(module: torch.nn.Module, prefix: str, without: str = "-") -> dict[str, Shape]:
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items() if not name.startswith(without)}


@pytest.mark.parametrize(
    ("vision", "deepstack", "total"),
    [(QWEN3_VL, True, 576_388_336), (INTERN_S1_PRO, False, 339_807_232), (ODD_QWEN3_VL, True, None)],
    ids=["Qwen3-VL-235B-A22B", "Intern-S1-Pro", "odd sizes"],
)
def test_qwen3_vl_tower_is_the_one_that_transformers_builds(vision: dict[str, Any], deepstack: bool, total: int | None) -> None:
    ours = qwen3_vl_tower(vision, "model.visual.", deepstack)
    config = Qwen3VLMoeConfig(vision_config={"deepstack_visual_indexes": [], **vision}).vision_config
    with torch.device("meta"):
        theirs = shapes_of(Qwen3VLMoeVisionModel(config), "model.visual.")
    assert list(ours.items()) == list(theirs.items())
    assert total is None or sum(map(math.prod, ours.values())) == total


@pytest.mark.parametrize(
    ("vision", "text_hidden", "ratio", "total"),
    [
        (INTERN_VIT, 4096, 0.5, 5_605_735_808),
        (BARE_INTERN_VIT, 48, 0.5, None),
        (BARE_INTERN_VIT | {"attention_bias": True, "use_mask_token": True, "use_mean_pooling": False}, 16, 0.25, None),
        (
            BARE_INTERN_VIT | {"use_absolute_position_embeddings": False, "image_size": [28, 70], "patch_size": [7, 14]},
            16,
            1.0,
            None,
        ),
    ],
    ids=["Intern-S1", "bare", "biases and final norm", "no positions, oblong"],
)
def test_intern_vit_is_the_one_that_transformers_builds(
    vision: dict[str, Any], text_hidden: int, ratio: float, total: int | None
) -> None:
    ours = intern_vit(vision, text_hidden, ratio, "model.vision_tower.", "model.multi_modal_projector.")
    text = {"model_type": "qwen3", "hidden_size": text_hidden, "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = InternVLModel(InternVLConfig(vision_config=dict(vision), text_config=text, downsample_ratio=ratio))
    theirs = shapes_of(model, "model.", without="language_model.")
    assert list(ours.items()) == list(theirs.items())
    assert total is None or sum(map(math.prod, ours.values())) == total


@pytest.mark.parametrize("key", sorted(QWEN3_VL.keys() - {"num_heads"}))
def test_a_key_that_the_qwen3_vl_tower_needs_is_named(key: str) -> None:
    with pytest.raises(InputError, match=rf"vision_config.*{key}=None"):
        qwen3_vl_tower({name: value for name, value in QWEN3_VL.items() if name != key}, "model.visual.", deepstack=True)


@pytest.mark.parametrize("key", sorted(BARE_INTERN_VIT.keys() - {"num_attention_heads"}))
@pytest.mark.parametrize("value", [None, 0, True, "14", [14, 0], [14]])
def test_a_key_that_the_intern_vit_needs_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"vision_config.*{key}="):
        intern_vit(BARE_INTERN_VIT | {key: value}, 48, 0.5, "model.vision_tower.", "model.multi_modal_projector.")
