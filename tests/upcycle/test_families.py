"""Every family is read from every layout of its files and written to every other, tensor for tensor and bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.verify import verify
from tests.parents import TINY, make_parent
from tests.upcycle.expanding import ROOT
from tests.upcycle.families import FAMILIES, Parent, due, expanded, make
from tests.upcycle.stacks import STACK, Tensors, apart, assert_same, read, stored
from tests.upcycle.vl_parent import parent_model

CARRIED = {
    "qwen3_moe": (),
    "qwen3_vl_moe": ("model.visual.",),
    "interns1": ("model.vision_tower.", "model.multi_modal_projector."),
    "interns1_pro": ("model.visual.", "model.language_model.rotary_emb.", "model.time_series."),
}
CHILD_TYPES = {
    "qwen3_moe": ("qwen3_moe_grouped", "Qwen3MoeGroupedForCausalLM"),
    "qwen3_vl_moe": ("qwen3_vl_moe_grouped", "Qwen3VLMoeGroupedForConditionalGeneration"),
    "interns1": ("interns1_grouped", "InternS1GroupedForConditionalGeneration"),
    "interns1_pro": ("interns1_pro", "InternS1ProForConditionalGeneration"),
}


@pytest.mark.parametrize("layout", ["same", "split", "fused"])
@pytest.mark.parametrize("fused", [False, True], ids=["split parent", "fused parent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_child_is_the_one_computed_by_hand(family: str, fused: bool, layout: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", fused=fused)
    child, rows = expanded(parent, tmp_path / "child", experts_layout=layout)
    stacked = fused if layout == "same" else layout == "fused"
    expected = due(parent, rows, fused=stacked)
    assert_same(read(child), expected)
    assert any(STACK.fullmatch(name) for name in expected) == stacked
    for start in CARRIED[family]:
        assert any(name.startswith(start) for name in expected)
    assert verify(parent.folder, child).tensors == len(expected)
    assert set(open_checkpoint(child).tensors) == set(expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_dtypes_and_tied_heads_are_kept(dtype: str, tie: bool, tmp_path: Path) -> None:
    folder = make_parent(tmp_path / "parent", **TINY | {"top_k": 4, "dtype": dtype, "tie": tie, "hub_form": tie})
    parent = Parent(folder=folder, config=json.loads((folder / "config.json").read_text()), tensors=read(folder))
    for layout in ("split", "fused"):
        child, rows = expanded(parent, tmp_path / layout, experts_layout=layout)
        tensors = read(child)
        assert_same(tensors, due(parent, rows, fused=layout == "fused"))
        assert ("lm_head.weight" in tensors) != tie
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        verify(folder, child)


@pytest.mark.parametrize("layout", ["same", "split", "fused"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "interns1", "interns1_pro"])
def test_fp32_and_fp16_parents_with_towers_keep_their_dtype(family: str, layout: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        parent = make(family, tmp_path / f"{dtype} parent", dtype=dtype, tie=dtype == torch.float16)
        child, rows = expanded(parent, tmp_path / f"{dtype} child", experts_layout=layout)
        assert_same(read(child), due(parent, rows, fused=layout == "fused"))


def vl_by_transformers(folder: Path, dtype: torch.dtype) -> Parent:
    """Stacks are [E, 2 I, H] and [E, H, I] in its files, with 2 I = H."""
    parent_model().to(dtype).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return Parent(folder=folder, config=config, tensors=apart(read(folder), transposed=False), transposed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vl_parent_that_transformers_saved_gets_children_in_the_orientation_of_the_hub(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    parent = vl_by_transformers(tmp_path / "parent", dtype)
    stacks = {name: value for name, value in read(parent.folder).items() if STACK.fullmatch(name)}
    assert {tuple(value.shape) for value in stacks.values()} == {(8, 48, 48), (8, 48, 24)}
    for layout in ("same", "split", "fused"):
        child, rows = expanded(parent, tmp_path / layout, experts_layout=layout)
        tensors = read(child)
        assert_same(tensors, due(parent, rows, fused=layout != "split"))
        if layout != "split":
            assert {tuple(value.shape) for name, value in tensors.items() if STACK.fullmatch(name)} == {
                (32, 48, 48),
                (32, 24, 48),
            }
        verify(parent.folder, child)


def test_both_orientations_of_a_vl_parent_give_the_same_child(tmp_path: Path) -> None:
    saved = vl_by_transformers(tmp_path / "saved", torch.bfloat16)
    hub = tmp_path / "hub"
    shutil.copytree(saved.folder, hub)

    save_file(stored(saved.tensors, transposed=True), hub / "model.safetensors", metadata={"format": "pt"})
    children = [
        read(expanded(parent, tmp_path / f"child {number}")[0])
        for number, parent in enumerate((saved, replace(saved, folder=hub)))
    ]
    assert_same(*children)


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """Values by their paths, `text_config.num_experts`."""
    if not isinstance(config, dict):
        return {path.removesuffix("."): config}
    return {name: value for key, item in config.items() for name, value in flat(item, f"{path}{key}.").items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_parents_but_for_what_must_change(family: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent")
    child, _ = expanded(parent, tmp_path / "child")
    before, after = flat(parent.config), flat(json.loads((child / "config.json").read_text()))
    model_type, class_name = CHILD_TYPES[family]
    text = "text_config." if "text_config" in parent.config else ""
    experts, groups = (64, 8) if family == "interns1_pro" else (32, 4)
    changed = {"model_type": model_type, "architectures": [class_name]}
    changed |= {f"{text}num_experts": experts, f"{text}router_n_groups": groups}
    if family == "qwen3_vl_moe":
        changed["text_config.model_type"] = "qwen3_vl_moe_grouped_text"
    due_config = before | changed
    if family != "interns1_pro":
        code = {name: value for name, value in after.items() if name.startswith("auto_map.")}
        assert all(value.startswith(("configuration_", "modeling_")) and "_grouped." in value for value in code.values())
        assert bool(code) == (family != "interns1")
        due_config = {name: value for name, value in due_config.items() if not name.startswith("auto_map.")} | code
    assert after == due_config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grouped_child_is_refused_where_its_code_is_not_trusted(family: str, tmp_path: Path) -> None:
    """interns1_pro is a type with groups of its own; transformers knows it no more than the others."""
    child, _ = expanded(make(family, tmp_path / "parent"), tmp_path / "child")
    with pytest.raises((ValueError, KeyError), match=r"custom code|does not recognize this architecture"):
        AutoConfig.from_pretrained(child, trust_remote_code=False)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.8.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"),
        ("qwen3_moe", "model.visual.blocks.0.attn.qkv.weight"),
        ("qwen3_vl_moe", "model.vision_tower.embeddings.cls_token"),
        ("qwen3_vl_moe", "model.time_series.positions"),
        ("qwen3_vl_moe", "model.layers.0.mlp.gate.weight"),
        ("interns1", "model.visual.blocks.0.attn.qkv.weight"),
        ("interns1_pro", "model.visual.deepstack_merger_list.0.norm.bias"),
        ("interns1_pro", "model.language_model.rotary_emb.inv_freq"),
    ],
)
def test_a_tensor_that_the_family_does_not_have_is_named(family: str, name: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", change=lambda tensors: tensors | {name: torch.ones(8, 32)})
    with pytest.raises(InputError, match=f"holds {re.escape(name)}, which is no tensor of a {family} model"):
        open_checkpoint(parent.folder)


EXPERT_3 = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("name", [EXPERT_3, "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=lambda tensors: tensors.pop(name) is None or tensors)
    with pytest.raises(InputError, match=f"has no tensor {re.escape(name)}"):
        open_checkpoint(parent.folder)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, "F32"), (torch.int16, "I16"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_an_expert_of_another_dtype_is_named(dtype: torch.dtype, code: str, tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=lambda tensors: tensors | {EXPERT_3: tensors[EXPERT_3].to(dtype)})
    plain = {key: value for key, value in parent.config.items() if key != "quantization_config"}
    (parent.folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match=f"{re.escape(EXPERT_3)} is stored as {code}"):
        open_checkpoint(parent.folder)


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj"])
def test_gates_and_ups_of_two_dtypes_are_not_stacked(matrix: str, tmp_path: Path) -> None:
    """One stack has one dtype; apart they are copied as they are, and a down_proj has a stack of its own."""

    def widened(which: str) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {k: v.float() if ".experts." in k and which in k else v for k, v in tensors.items()}

    parent = make("qwen3_moe", tmp_path / "parent", change=widened(matrix))
    child, rows = expanded(parent, tmp_path / "split")
    assert_same(read(child), due(parent, rows, fused=False))
    with pytest.raises(InputError, match=r"up_proj\.weight is stored as \w+ and .*gate_proj\.weight as \w+, which one stack"):
        expanded(parent, tmp_path / "fused", experts_layout="fused")
    down = make("qwen3_moe", tmp_path / "down", change=widened("down_proj"))
    child, rows = expanded(down, tmp_path / "down child", experts_layout="fused")
    assert_same(read(child), due(down, rows, fused=True))
    verify(down.folder, child)


MIXED = (
    r"holds experts stacked \(model\.layers\.{}_proj\) and others one by one \(model\.layers\.\d\.mlp\.experts\.\d\.\w+\.weight\)"
)


@pytest.mark.parametrize(
    ("part", "stack"),
    [("layers.2.", r"2\.\S+\.(gate_up|down)"), ("layers.0.", r"0\.\S+\.(gate_up|down)"), ("down_proj", r"\S+\.down")],
)
def test_stacked_and_single_experts_in_one_folder_are_refused_by_name(part: str, stack: str, tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> Tensors:
        stacked = {name: value for name, value in tensors.items() if part in name}
        return {name: value for name, value in tensors.items() if part not in name} | stored(stacked, transposed=False)

    with pytest.raises(InputError, match=MIXED.format(stack)):
        open_checkpoint(make("qwen3_moe", tmp_path / "parent", change=mix).folder)


def test_experts_stored_both_ways_at_once_are_refused_by_name(tmp_path: Path) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", change=lambda tensors: tensors | stored(tensors, transposed=False))
    with pytest.raises(InputError, match=MIXED.format(r"\S+")):
        open_checkpoint(parent.folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_beside_a_tied_one_is_refused_with_both_ways_out(family: str, tmp_path: Path) -> None:
    """transformers 5 unties heads that differ from the embedding, 4 drops them: which one holds is the user's to say."""
    untied = make(family, tmp_path / "untied")
    shutil.copytree(untied.folder, tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(untied.config | {"tie_word_embeddings": True}))
    with pytest.raises(
        InputError, match=r"holds lm_head\.weight, .*tied/config\.json has tie_word_embeddings=true, .*; set it to false"
    ):
        open_checkpoint(tmp_path / "tied")
    open_checkpoint(untied.folder)  # the first way out
    files = {name: value for name, value in read(tmp_path / "tied").items() if name != "lm_head.weight"}
    for file in (tmp_path / "tied").glob("model*"):
        file.unlink()
    save_file(files, tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "tied").tensors


def test_a_missing_tower_or_buffer_of_another_shape_is_named(tmp_path: Path) -> None:
    parent = make("interns1_pro", tmp_path / "parent")
    vision = parent.config["vision_config"] | {"depth": 3}
    (parent.folder / "config.json").write_text(json.dumps(parent.config | {"vision_config": vision}))
    with pytest.raises(InputError, match=r"has no tensor model\.visual\.blocks\.2\.norm1\.weight"):
        open_checkpoint(parent.folder)
    text = parent.config["text_config"] | {"max_position_embeddings": 4096}
    (parent.folder / "config.json").write_text(json.dumps(parent.config | {"text_config": text}))
    with pytest.raises(InputError, match=r"rotary_emb\.(sin|cos)_coef has the shape \[2, 3, 3\].*\[2, 4, 4\]"):
        open_checkpoint(parent.folder)


NEW_FAMILY = '''
"""A family that no one knew before."""
from moexpand.upcycle.family import Family

def _scales(config, where):
    return {"network.scale": (config["hidden_size"],)}

NEW = dict(
    class_name="NewForCausalLM", child="new_moe_grouped", prefix="network.", router="mlp.router.weight", head="head.weight",
    last={"final.weight": "H"}, carried=_scales,
)
FAMILIES = (Family(model_type="new_moe", **NEW), Family(model_type="new_moe_grouped", **NEW))
'''

EXPAND = """
import sys
from pathlib import Path
import moexpand.upcycle
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.planner import Wishes, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.verify import verify
from moexpand.upcycle.writer import expand
source, target = map(Path, sys.argv[1:])
assert Path(moexpand.upcycle.__file__).is_relative_to(source.parent)
parent = open_checkpoint(source)
plan = make_plan(parent, Wishes(num_experts=32, num_groups=4, placement="random_balanced", experts_layout="fused"))
expand(Recipe(parent, plan), target)
verify(source, target)
"""


def test_a_new_family_is_one_new_file(tmp_path: Path) -> None:
    installed = tmp_path / "moexpand"
    for room, place in (("moexpand", installed), ("upcycle", installed / "upcycle")):
        shutil.copytree(ROOT / room, place, ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "upcycle" / "families" / "new_moe.py").write_text(NEW_FAMILY)
    renamed = {"model.norm.": "network.final.", "model.": "network.", "mlp.gate.weight": "mlp.router.weight", "lm_head.": "head."}

    def rename(tensors: Tensors) -> Tensors:
        for old, new in renamed.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        return tensors | {"network.scale": torch.arange(32.0)}

    parent = make("qwen3_moe", tmp_path / "parent", change=rename)
    (parent.folder / "config.json").write_text(json.dumps(parent.config | {"model_type": "new_moe"}))
    command = [sys.executable, "-c", EXPAND, str(parent.folder), str(tmp_path / "child")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensors, before = read(tmp_path / "child"), read(parent.folder)
    rows = json.loads((tmp_path / "child" / "expansion.json").read_text())["slot_to_parent"]
    assert torch.equal(tensors["network.scale"], torch.arange(32.0))
    for layer in (0, 2):
        router, down = f"network.layers.{layer}.mlp.router.weight", f"network.layers.{layer}.mlp.experts"
        assert torch.equal(tensors[router], before[router][rows[layer]])
        assert torch.equal(
            tensors[f"{down}.down_proj"], torch.stack([before[f"{down}.{e}.down_proj.weight"] for e in rows[layer]])
        )
