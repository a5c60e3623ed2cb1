"""Every byte of the parent is read once, whatever is made of it, and every byte of a child once more to prove it."""

from pathlib import Path

import pytest

from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.planner import Wishes, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.verify import verify
from moexpand.upcycle.writer import expand
from tests.upcycle.expanding import write_parent
from tests.upcycle.families import make

INITS = {
    "copies": Init(),
    "noise": Init(expert_noise=0.05, router_noise=0.05),
    "noise on every copy": Init(expert_noise=0.05, keep_first=False),
    "drop": Init(kind="drop"),
}


def recipe_of(folder: Path, layout: str, init: Init) -> Recipe:
    parent = open_checkpoint(folder)
    experts = 4 * parent.architecture.num_experts
    wishes = Wishes(
        num_experts=experts, num_groups=2, placement="random_balanced", experts_layout=layout, init=init, default_noise=False
    )
    return Recipe(parent, make_plan(parent, wishes))


def read_so_far() -> int:
    """Bytes that this process has asked the system for, all threads together."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("fused", [False, True], ids=["split parent", "fused parent"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_each_byte_of_the_parent_is_read_once(family: str, fused: bool, layout: str, init: Init, tmp_path: Path) -> None:
    recipe = recipe_of(make(family, tmp_path / "parent", fused=fused).folder, layout, init)
    summary = expand(recipe, tmp_path / "child", workers=3)
    assert summary.bytes_read == recipe.parent.nbytes


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@pytest.mark.parametrize("layout", ["split", "fused"])
def test_the_system_counts_the_same(layout: str, init: Init, tmp_path: Path) -> None:
    parent = write_parent(tmp_path / "parent", hidden=512, intermediate=384)
    recipe = recipe_of(parent, layout, init)
    source = recipe.parent.nbytes
    begin = read_so_far()
    expand(recipe, tmp_path / "child", workers=2)
    written = read_so_far()
    assert 0.99 * source < written - begin < 1.03 * source, "blocks around what is not aligned, and side files, are in it"
    verify(parent, tmp_path / "child", workers=2)
    both = source + open_checkpoint(tmp_path / "child").nbytes
    assert 0.99 * both < read_so_far() - written < 1.05 * both, "so are headers and files that checksums are taken of"
