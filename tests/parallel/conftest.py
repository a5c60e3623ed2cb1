"""Parents and children that the engine's tests read, and transformers' own models of them."""

from pathlib import Path

import pytest

from tests.parents import make_child, make_parent

PLACEMENTS = ("halves_bits", "halves_tile")


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts, top-8, two layers, fp32."""
    return make_parent(tmp_path_factory.mktemp("engine") / "parent")


@pytest.fixture(scope="session")
def deep_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 experts, top-8, four layers, so that two interleaved stages have two parts each; small, as every layout trains it."""
    folder = tmp_path_factory.mktemp("engine") / "deep"
    return make_parent(folder, experts=32, layers=4, hidden=32, intermediate=16, head_dim=8, seed=2, max_shard_size="200KB")


@pytest.fixture(scope="session")
def deep_child(deep_parent: Path) -> Path:
    """Its child of 128 experts in 8 groups."""
    return make_child(deep_parent, deep_parent.with_name("deep_child"), placement="halves_bits", num_experts=128)


@pytest.fixture(scope="session")
def tied_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts, top-4, tied head, probabilities that are not divided by their sum."""
    folder = tmp_path_factory.mktemp("engine") / "tied"
    return make_parent(folder, experts=16, top_k=4, tie=True, norm_topk_prob=False, seed=1, max_shard_size="200KB")


@pytest.fixture(scope="session")
def children(parent: Path) -> dict[str, Path]:
    """The parent's child of 512 experts in 8 groups, by placement."""
    return {name: make_child(parent, parent.with_name(f"child_{name}"), placement=name) for name in PLACEMENTS}
