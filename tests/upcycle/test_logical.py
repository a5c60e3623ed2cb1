"""What the engine reads: a folder of any layout, or a child that exists as a plan alone and equals the written one bitwise."""

import tracemalloc
from pathlib import Path

import pytest
import torch

from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.logical import ExpandedWeights, StoredWeights, Weights
from moexpand.upcycle.recipe import Recipe
from tests.expansions import (
    GROWN,
    INITS,
    LAYERS,
    SIZES,
    SLOTS,
    expert_bytes,
    needed_bytes,
    plan_of,
    recorded_reads,
    write_child,
)
from tests.upcycle import families, stacks

Parents = dict[tuple[str, torch.dtype], families.Parent]
LAYOUTS = ("split", "fused")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Parents:
    """The same parent in both layouts and two dtypes."""
    base = tmp_path_factory.mktemp("parents")
    cases = [(layout, dtype) for layout in LAYOUTS for dtype in (torch.bfloat16, torch.float32)]
    return {
        (layout, dtype): families.make("qwen3_moe", base / f"{layout} {dtype}", fused=layout == "fused", dtype=dtype, **SIZES)
        for layout, dtype in cases
    }


def expanded(parent: Path, init: str) -> ExpandedWeights:
    return ExpandedWeights(Recipe(open_checkpoint(parent), plan_of(parent, init)))


def everything(weights: Weights) -> stacks.Tensors:
    return {name: weights.read_torch(name) for name in weights.names}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("init", INITS)
def test_an_unwritten_child_equals_the_written_one(parents: Parents, tmp_path: Path, init: str, layout: str) -> None:
    """The written one is read by the safetensors library; its experts come from the layout that the parent has not."""
    for dtype in (torch.bfloat16, torch.float32):
        parent = parents[layout, dtype]
        weights = expanded(parent.folder, init)
        child = write_child(parent.folder, weights.recipe.plan, tmp_path / str(dtype), LAYOUTS[layout == "split"])
        due = stacks.apart(stacks.read(child), False)
        stacks.assert_same(everything(weights), due)
        assert weights.config == open_checkpoint(child).config
        assert weights.architecture == open_checkpoint(child).architecture
        routers = {value.dtype for name, value in due.items() if name.endswith("mlp.gate.weight")}
        assert routers == {torch.float32 if init == "fp32 router" else dtype}
        assert len(due["lm_head.weight"]) == (GROWN if init == "vocabulary" else SIZES["vocab"])


def test_exact_copies_are_what_the_map_says(parents: Parents) -> None:
    for layout in LAYOUTS:
        parent = parents[layout, torch.bfloat16]
        weights = expanded(parent.folder, "exact copies")
        stacks.assert_same(everything(weights), families.due(parent, weights.recipe.plan.slot_to_parent, fused=False))


def test_inits_change_what_they_say_and_nothing_else(parents: Parents) -> None:
    """Against the copies of the same map, by the seed alone: a test that compares equal children would pass on no init at all."""
    parent = parents["split", torch.bfloat16]
    changed = {}
    for init in INITS:
        weights = expanded(parent.folder, init)
        copies = families.due(parent, weights.recipe.plan.slot_to_parent, fused=False)
        found = everything(weights)
        different = {
            name
            for name, value in found.items()
            if value.shape != copies[name].shape or not torch.equal(value.float(), copies[name].float())
        }
        changed[init] = {name.rpartition(".mlp.")[2].split(".")[0] for name in different}
    noisy_router = {"gate"}
    assert changed == {
        "exact copies": set(),
        "router noise": noisy_router,
        "fp32 router": noisy_router,
        "expert noise": {"experts"},
        "drop, shared units": {"experts"},
        "drop, units of their own": noisy_router | {"experts"},
        "no exact copy": noisy_router | {"experts"},
        "vocabulary": noisy_router | {"experts", "model", "lm_head"},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_gives_the_same_tensors_whatever_its_layout(parents: Parents, layout: str) -> None:
    parent = parents[layout, torch.bfloat16]
    weights = StoredWeights(open_checkpoint(parent.folder))
    stacks.assert_same(everything(weights), parent.tensors)
    assert weights.names == list(StoredWeights(open_checkpoint(parents["split", torch.bfloat16].folder)).names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_rows_of_the_whole(parents: Parents, layout: str) -> None:
    parent = parents[layout, torch.bfloat16].folder
    for weights in (StoredWeights(open_checkpoint(parent)), expanded(parent, "vocabulary"), expanded(parent, "exact copies")):
        for name, whole in everything(weights).items():
            for rows in (slice(0, 3), slice(5, len(whole))):
                part = weights.read_torch(name, rows)
                assert torch.equal(stacks.bits(part), stacks.bits(whole[rows])), (name, rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("init", ["exact copies", "no exact copy"])
def test_in_their_order_every_needed_expert_is_read_once(parents: Parents, layout: str, init: str) -> None:
    parent = parents[layout, torch.bfloat16].folder
    weights = expanded(parent, init)
    for slots in (range(SLOTS), range(8), range(3, 5)):
        found = {name: stacks.EXPERT.fullmatch(name) for name in weights.names}
        names = [name for name, expert in found.items() if expert is None or int(expert[2]) in slots]
        with recorded_reads() as reads:
            for name in sorted(names, key=weights.order):
                weights.read_torch(name)
        assert expert_bytes(parent, reads) == needed_bytes(parent, weights.recipe.plan, slots)
        weights = expanded(parent, init)


def test_memory_stays_that_of_one_expert(tmp_path: Path) -> None:
    """Of a parent with 2 x 8 experts of 384 KiB each, all 64 slots are made and dropped."""
    sizes = SIZES | {"hidden": 256, "inner": 256}
    parent = families.make("qwen3_moe", tmp_path / "parent", **sizes).folder
    weights, expert = expanded(parent, "no exact copy"), 3 * 256 * 256 * 2
    names = [name for name in sorted(weights.names, key=weights.order) if ".experts." in name]
    assert len(names) == LAYERS * SLOTS * 3
    weights.read_torch(names[0])
    tracemalloc.start()
    try:
        for name in names:
            weights.read_torch(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert expert < peak < 5 * expert, peak


def test_a_tensor_may_be_changed_by_who_read_it(parents: Parents) -> None:
    weights = expanded(parents["split", torch.bfloat16].folder, "exact copies")
    slots = [slot for slot, parent in enumerate(weights.recipe.plan.slot_to_parent[0]) if parent == 3]
    names = [f"model.layers.0.mlp.experts.{slot}.up_proj.weight" for slot in slots]
    first = weights.read_torch(names[0])
    before = first.clone()
    first.zero_()
    for name in names:
        assert torch.equal(weights.read_torch(name), before)
