"""A child is the same model in every layout of its files: for noise, for dense layers, and for what transformers makes of it."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moexpand.base.files import sha256
from moexpand.upcycle.inits import Init
from moexpand.upcycle.verify import verify
from tests import closed_form
from tests.parents import TINY, make_child, make_parent
from tests.upcycle.families import FAMILIES, due, expanded, make
from tests.upcycle.stacks import EXPERT, STACK, Tensors, apart, assert_same, read

NOISES = {
    "router noise": Init(router_noise=0.05, seed=3),
    "expert noise": Init(expert_noise=0.05, router_noise=0.05, seed=3),
    "drop": Init(kind="drop", drop_fraction=0.25, seed=3),
    "drop, units of their own, no exact copy": Init(kind="drop", drop_shared=False, keep_first=False, seed=3),
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
@pytest.mark.parametrize("fused", [False, True], ids=["split parent", "fused parent"])
def test_noise_is_the_same_in_split_and_fused_files(family: str, fused: bool, noise: Init, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", fused=fused)
    wishes: dict[str, Any] = {"init": noise, "default_noise": False}
    folders = {layout: expanded(parent, tmp_path / layout, experts_layout=layout, **wishes) for layout in ("split", "fused")}
    split, stacked = (read(folder) for folder, _ in folders.values())
    assert not any(STACK.fullmatch(name) for name in split)
    assert not any(EXPERT.fullmatch(name) for name in stacked)
    assert_same(apart(stacked, parent.transposed), split)
    for folder, _ in folders.values():
        verify(parent.folder, folder)
    _check_where_it_is(split, due(parent, folders["split"][1], fused=False), folders["split"][1], noise)


def _check_where_it_is(found: Tensors, copied: Tensors, rows: list[list[int]], noise: Init) -> None:
    """Noise is on all slots but the first of every parent, in the experts if they have any, and nowhere else."""
    experts = noise.kind == "drop" or noise.expert_noise > 0
    for name, value in found.items():
        if name.endswith(".mlp.gate.weight"):
            row = rows[int(name.split("layers.")[1].split(".")[0])]
            noisy = [
                noise.router_noise > 0 and (slot != row.index(expert) or not noise.keep_first) for slot, expert in enumerate(row)
            ]
            assert (value != copied[name]).any(1).tolist() == noisy
        elif part := EXPERT.fullmatch(name):
            row, slot = rows[int(name.split("layers.")[1].split(".")[0])], int(part[2])
            exact = not experts or (noise.keep_first and slot == row.index(row[slot]))
            assert torch.equal(value, copied[name]) == exact, name
        else:
            assert torch.equal(value, copied[name]), name


def _layer(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_routers_hold_the_parents_rows_exactly_and_noise_that_bf16_would_swallow(
    family: str, layout: str, tmp_path: Path
) -> None:
    parent = make(family, tmp_path / "parent")
    noises = {"exact": Init(), "noisy": Init(router_noise=1e-4)}
    children = {
        name: expanded(parent, tmp_path / name, experts_layout=layout, router_dtype="float32", init=init, default_noise=False)
        for name, init in noises.items()
    }
    exact, noisy = (read(folder) for folder, _ in children.values())
    copied = due(parent, children["exact"][1], fused=layout == "fused")
    routers = {name: copied[name].float() for name in copied if name.endswith(".mlp.gate.weight")}
    assert_same(exact, copied | routers)
    assert_same(
        {name: noisy[name] for name in noisy if name not in routers}, {k: v for k, v in copied.items() if k not in routers}
    )
    for name, rows in routers.items():
        assert noisy[name].dtype == torch.float32
        relative = (noisy[name] - rows).square().mean(1).sqrt() / rows.square().mean(1).sqrt()
        assert (relative == 0).sum() == len(rows) // 4
        assert relative[relative > 0].mean() == pytest.approx(1e-4, rel=0.1)
    verify(parent.folder, children["noisy"][0])


@pytest.mark.parametrize(
    ("family", "fused", "layout"),
    [("qwen3_moe", False, "fused"), ("qwen3_vl_moe", True, "split"), ("qwen3_vl_moe", False, "fused")],
)
def test_the_number_of_workers_does_not_change_a_converted_child(family: str, fused: bool, layout: str, tmp_path: Path) -> None:
    parent = make(family, tmp_path / "parent", fused=fused)
    noise = {"init": Init(kind="drop", expert_noise=0.1, router_noise=0.1), "default_noise": False, "max_shard_size": "30KB"}
    hashes = []
    for workers in (1, 2, 4):
        folder, _ = expanded(parent, tmp_path / str(workers), experts_layout=layout, workers=workers, **noise)
        hashes.append({file.name: sha256(file) for file in folder.iterdir()})
    assert len(hashes[0]) > 8
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_fused_child_is_the_split_one_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent = make("qwen3_moe", tmp_path / "parent", dtype=torch.float32)
    noise = Init(router_noise=0.1, expert_noise=0.1)
    logits = []
    for layout in ("split", "fused"):
        child, _ = expanded(parent, tmp_path / layout, experts_layout=layout, init=noise, default_noise=False)
        with caplog.at_level(logging.WARNING):
            model, info = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(torch.arange(40).reshape(2, 20)).logits)
    assert not [record for record in caplog.records if "transformers" in record.name and record.levelno >= logging.WARNING]
    assert torch.equal(*logits)


def one_of_each_group(row: list[int], groups: int) -> closed_form.Pick:
    """The parents that a child picks at step 0: in every group the one with the largest logit."""
    members = np.array(row).reshape(groups, -1)

    def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.array([group[logits[group].argmax()] for group in members])
        return chosen, closed_form.softmax(logits[chosen])

    return pick


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({"mlp_only_layers": [0, 2]}, [0, 2]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [3]}, [0, 1, 3]),
    ],
    ids=str,
)
def test_layers_without_experts_are_carried_and_compute_what_they_did(
    keys: dict[str, Any], dense: list[int], layout: str, tmp_path: Path
) -> None:
    sizes = TINY | {"experts": 8, "top_k": 4, "layers": 4, "hub_form": True} | keys
    parent, tokens = make_parent(tmp_path / "parent", **sizes), np.arange(48).reshape(2, 24)
    wishes = {"num_experts": 16, "num_groups": 4, "placement": "halves_bits", "experts_layout": layout}
    child = make_child(parent, tmp_path / "child", **wishes)
    rows = json.loads((child / "expansion.json").read_text())["slot_to_parent"]
    assert [layer for layer, row in enumerate(rows) if not row] == dense
    before, after = read(parent), read(child)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert (name in after) == (layer in dense)
        assert name not in after or torch.equal(before[name], after[name])
    verify(parent, child)
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.double().numpy()
    row = next(row for row in rows if row)
    assert all(other in ([], row) for other in rows)
    assert np.abs(found - closed_form.logits(parent, tokens, one_of_each_group(row, 4))).max() <= 1e-5
    assert np.abs(found - closed_form.logits(parent, tokens, closed_form.top_pick(4))).max() > 0.01
