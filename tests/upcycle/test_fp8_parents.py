"""Block-FP8 parents: weights and scales follow their expert byte for byte, and nothing that would need other scales is done.

The FP8 weights are made here, by a quantiser of the test's own: E4M3 with one scale for every 128 x 128 weights.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.base.errors import CheckFailed, InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.verify import verify
from tests.upcycle.families import FAMILIES, due, expanded, make
from tests.upcycle.stacks import EXPERT, Tensors, apart, assert_same, bits, read

BLOCKS = {"hidden": 160, "inner": 128, "layers": 2}
"""H is no multiple of a block; I must be one wherever experts are stacked or cut."""

Change = Callable[[Tensors], Tensors]


def block_fp8(scales: torch.dtype = torch.float32, only: str = "_proj.weight") -> Change:
    """Quantises attention, dense layers and experts; or those whose names contain `only`."""

    def quantise(tensors: Tensors) -> Tensors:
        found = {}
        for name, value in tensors.items():
            found[name] = value
            if name.endswith("_proj.weight") and only in name:
                found[name], found[f"{name}_scale_inv"] = _blocks(value.float(), scales)
        return found

    return quantise


def _blocks(value: torch.Tensor, scales: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (-(-size // 128) for size in value.shape)
    scale, whole = torch.empty(rows, columns), torch.empty_like(value)
    for row in range(rows):
        for column in range(columns):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            largest = value[block].abs().max() / 448
            scale[row, column] = largest if scales == torch.float32 else 2 ** largest.log2().ceil()
            whole[block] = value[block] / scale[row, column]
    return whole.to(torch.float8_e4m3fn), scale.to(scales)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights that block-FP8 stands for, in float64."""
    wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.double() * wide[: weight.shape[0], : weight.shape[1]]


@pytest.mark.parametrize("layout", ["same", "split", "fused"])
@pytest.mark.parametrize("fused", [False, True], ids=["split parent", "fused parent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_scales_follow_their_expert(family: str, fused: bool, layout: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", fused=fused, change=block_fp8(), **BLOCKS)
    child, rows = expanded(parent, tmp_path / "child", experts_layout=layout)
    assert_same(read(child), due(parent, rows, fused=fused if layout == "same" else layout == "fused"))
    verify(parent.folder, child)
    assert open_checkpoint(child).architecture.num_experts == len(rows[0])
    config = json.loads((child / "config.json").read_text())
    assert config["quantization_config"] == parent.config["quantization_config"]


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_the_experts_that_a_child_stands_for_are_the_unquantised_ones_to_the_rounding_of_e4m3(
    layout: str, tmp_path: Path
) -> None:
    """What makes the bytes meaningful: dequantised by hand, slot by slot, they are the weights from before the quantiser."""
    plain = make("qwen3_vl_moe", tmp_path / "plain", dtype=torch.float32, **BLOCKS).tensors
    parent = make("qwen3_vl_moe", tmp_path / "parent", fused=True, dtype=torch.float32, change=block_fp8(), **BLOCKS)
    child, rows = expanded(parent, tmp_path / "child", experts_layout=layout)
    tensors = apart(read(child), transposed=True)
    checked = 0
    for name in list(tensors):
        part = EXPERT.fullmatch(name)
        if part is None or part[4]:
            continue
        layer, slot = int(name.split("layers.")[1].split(".")[0]), int(part[2])
        before = plain[name.replace(f"experts.{slot}.", f"experts.{rows[layer][slot]}.")].double()
        found = dequantised(tensors[name], tensors[f"{name}_scale_inv"])
        assert (found - before).abs().max() <= before.abs().max() / 16  # 3 bits of mantissa
        assert (found - before).norm() <= 0.05 * before.norm()
        checked += 1
    assert checked == 32 * 3


def test_scales_as_powers_of_two_are_kept_in_their_own_dtype(tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(torch.float8_e8m0fnu), **BLOCKS)
    for layout in ("split", "fused"):
        child, rows = expanded(parent, tmp_path / layout, experts_layout=layout)
        tensors = read(child)
        assert_same(tensors, due(parent, rows, fused=layout == "fused"))
        assert {tensors[name].dtype for name in tensors if name.endswith("_scale_inv")} == {torch.float8_e8m0fnu}
        verify(parent.folder, child)


@pytest.mark.parametrize(("fused", "layout"), [(False, "fused"), (True, "split")])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_experts_narrower_than_a_block_keep_their_layout(family: str, fused: bool, layout: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", fused=fused, change=block_fp8(), **BLOCKS | {"inner": 192 if not fused else 64})
    child, rows = expanded(parent, tmp_path / "same")
    assert_same(read(child), due(parent, rows, fused=fused))
    verify(parent.folder, child)
    with pytest.raises(InputError, match=r"FP8 experts of width \d+, which is no multiple .*128; keep .*experts_layout=same"):
        expanded(parent, tmp_path / "child", experts_layout=layout)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_router_noise_leaves_fp8_experts_alone(layout: str, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(), **BLOCKS)
    noise = {"init": Init(router_noise=0.1), "default_noise": False}
    child, rows = expanded(parent, tmp_path / "child", experts_layout=layout, **noise)
    found, copied = read(child), due(parent, rows, fused=layout == "fused")
    router = "model.layers.0.mlp.gate.weight"
    assert_same(found | {router: copied[router]}, copied)
    moved = (found[router] != copied[router]).any(1).tolist()
    assert moved == [rows[0].index(expert) != slot for slot, expert in enumerate(rows[0])]
    verify(parent.folder, child)


NOISES = [Init(expert_noise=0.1), Init(kind="drop"), Init(kind="drop", expert_noise=0.1, keep_first=False)]


@pytest.mark.parametrize("only", ["_proj.weight", "up_proj.weight", "down_proj.weight"])
@pytest.mark.parametrize("noise", NOISES, ids=["noise", "drop", "both"])
def test_noise_on_fp8_experts_is_refused(noise: Init, only: str, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(only=only), **BLOCKS)
    with pytest.raises(InputError, match=r"Experts stored as F8_E4M3 can only be copied as they are"):
        expanded(parent, tmp_path / "child", init=noise)
    assert not (tmp_path / "child").exists()


def test_a_plan_that_somebody_edited_is_refused_too(tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(), **BLOCKS)
    child, _ = expanded(parent, tmp_path / "child")
    plan = read_plan(child / "expansion.json")
    for edited in (replace(plan, expert_noise=0.1), replace(plan, init="drop")):
        with pytest.raises(InputError, match="Experts stored as F8_E4M3"):
            Recipe(open_checkpoint(parent.folder), edited)


LAYER, EXPERT_2 = "model.layers.0.", "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    "name",
    [f"{LAYER}self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", EXPERT_2, EXPERT_2.replace("2", "0")],
)
def test_a_missing_scale_is_named(name: str, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> Tensors:
        found = block_fp8()(tensors)
        del found[f"{name}_scale_inv"]
        return found

    with pytest.raises(InputError, match=_unscaled(name)):
        open_checkpoint(make("qwen3_moe", tmp_path / "parent", change=without, **BLOCKS).folder)


TOWERS = [
    ("qwen3_vl_moe", "model.visual.blocks.1.attn.qkv.weight"),
    ("qwen3_vl_moe", "model.visual.pos_embed.weight"),
    ("interns1", "model.multi_modal_projector.linear_2.weight"),
    ("interns1_pro", "model.language_model.rotary_emb.sin_coef"),
    ("interns1_pro", "model.time_series.conv1.weight"),
]


@pytest.mark.parametrize(("family", "name"), TOWERS)
def test_an_fp8_tensor_beside_the_decoder_without_its_scales_is_named(family: str, name: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", change=block_fp8(), **BLOCKS)
    _put(parent.folder, {name: read(parent.folder)[name].to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=_unscaled(name)):
        open_checkpoint(parent.folder)


@pytest.mark.parametrize(("family", "name"), [TOWERS[0], TOWERS[2], TOWERS[4]])
def test_an_fp8_tower_with_its_scales_is_carried(family: str, name: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", change=block_fp8(), **BLOCKS)
    weight = parent.tensors[name]
    scales = torch.full([-(-size // 128) for size in weight.shape], 0.5)
    parent.tensors.update({name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales})
    _put(parent.folder, {key: parent.tensors[key] for key in (name, f"{name}_scale_inv")})
    child, rows = expanded(parent, tmp_path / "child")
    assert_same(read(child), due(parent, rows, fused=False))
    verify(parent.folder, child)
    if family != "interns1_pro":  # whose time series come without a table of shapes
        _put(parent.folder, {f"{name}_scale_inv": torch.ones(7, 7)})
        with pytest.raises(InputError, match=rf"{re.escape(name)}_scale_inv has the shape \[7, 7\]"):
            open_checkpoint(parent.folder)


@pytest.mark.parametrize(("family", "columns"), [("qwen3_moe", np.s_[:, :1]), ("qwen3_vl_moe", np.s_[:, :, :1])])
def test_blocks_that_hold_gates_and_ups_at_once_are_the_reason_given(family: str, columns: Any, tmp_path: Path) -> None:
    """What a quantiser of whole stacks makes of experts of width 64: 2 x 64 rows are one block, with one scale."""
    parent = make(family, tmp_path / "parent", fused=True, change=block_fp8(), **BLOCKS | {"inner": 64})
    open_checkpoint(parent.folder)  # with scales of their own gates and ups can be told apart
    name = next(name for name in read(parent.folder) if name.endswith("gate_up_proj_scale_inv"))
    _put(parent.folder, {name: read(parent.folder)[name][columns].contiguous()})
    says = "has scales of blocks that hold gates and ups at once, as experts of width 64 are no multiple of 128; store"
    with pytest.raises(InputError, match=f"{re.escape(name)} {says}"):
        open_checkpoint(parent.folder)


def _unscaled(name: str) -> str:
    return f"{re.escape(name)} is stored as F8_E4M3, but its scales {re.escape(name)}_scale_inv are missing"


def _put(folder: Path, tensors: Tensors) -> None:
    """Write a folder's tensors anew, with some exchanged or added."""
    files = read(folder) | tensors
    for file in folder.glob("model*"):
        file.unlink()
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [
        (f"{LAYER}self_attn.q_proj.weight_scale_inv", torch.float8_e4m3fn, "is stored as F8_E4M3; scales may be"),
        (f"{LAYER}self_attn.q_proj.weight_scale_inv", torch.float16, "is stored as F16; scales may be"),
        (f"{EXPERT_2}_scale_inv", torch.bfloat16, "is stored as BF16, but the first expert's as F32"),
        (EXPERT_2, torch.bfloat16, "is stored as BF16, but the first expert's as F8_E4M3"),
        ("model.norm.weight", torch.float8_e4m3fn, None),
    ],
)
def test_a_weight_or_scale_of_another_dtype_is_named(name: str, dtype: torch.dtype, says: str | None, tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> Tensors:
        found = block_fp8()(tensors)
        return found | {name: found[name].to(dtype)}

    due_words = f"{re.escape(name)} {says}" if says else _unscaled(name)
    with pytest.raises(InputError, match=due_words):
        open_checkpoint(make("qwen3_moe", tmp_path / "parent", change=cast, **BLOCKS).folder)


@pytest.mark.parametrize("name", ["model.norm.weight_scale_inv", "lm_head.weight_scale_inv", f"{LAYER}mlp.gate.weight_scale_inv"])
def test_a_scale_without_an_fp8_weight_is_named(name: str, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=lambda tensors: block_fp8()(tensors) | {name: torch.ones(1)}, **BLOCKS)
    with pytest.raises(InputError, match=f"holds {re.escape(name)}, which is no tensor"):
        open_checkpoint(parent.folder)


def test_scales_of_another_shape_are_named(tmp_path: Path) -> None:
    name = f"{EXPERT_2}_scale_inv"
    parent = make(
        "qwen3_moe", tmp_path / "parent", change=lambda tensors: block_fp8()(tensors) | {name: torch.ones(2, 1)}, **BLOCKS
    )
    with pytest.raises(InputError, match=rf"{re.escape(name)} has the shape \[2, 1\], but config\.json calls for \[1, 2\]"):
        open_checkpoint(parent.folder)


@pytest.mark.parametrize(
    "rules",
    [
        None,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "weight_block_size": [128, 128]},
    ],
)
def test_other_quantisations_are_refused(rules: dict[str, Any] | None, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(), **BLOCKS)
    config = {key: value for key, value in parent.config.items() if key != "quantization_config"}
    (parent.folder / "config.json").write_text(json.dumps(config | ({"quantization_config": rules} if rules else {})))
    with pytest.raises(
        InputError, match="F8_E4M3 where config.json has a quantization_config" if rules is None else "only fp8 with"
    ):
        open_checkpoint(parent.folder)


def test_one_flipped_bit_of_a_scale_is_found_by_verify(tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=block_fp8(), **BLOCKS)
    child, _ = expanded(parent, tmp_path / "child", max_shard_size="1GB")
    (file,) = child.glob("*.safetensors")
    tensors, name = load_file(file), "model.layers.0.mlp.experts.7.down_proj.weight_scale_inv"
    bits(tensors[name])[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=rf"{name} differs from the parent's"):
        verify(parent.folder, child)
