"""Parents and children that several tests read; tests that change one copy it first (`damaged`)."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parents import TINY, make_child, make_parent

PLACEMENTS = ("halves_bits", "halves_tile")


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts, fp32, sharded, config in the form of the hub, with side files."""
    folder = make_parent(tmp_path_factory.mktemp("parent") / "parent")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture(scope="session")
def children(parent: Path) -> dict[str, Path]:
    """The parent's child by placement."""
    return {name: make_child(parent, parent.with_name(f"child_{name}"), placement=name) for name in PLACEMENTS}


@pytest.fixture(scope="session")
def small_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts, top-2, bf16, tied head, config as transformers 5 writes it: everything that `parent` is not."""
    shape = TINY | {"layers": 2, "dtype": "bfloat16", "tie": True, "hub_form": False, "max_shard_size": "20KB"}
    return make_parent(tmp_path_factory.mktemp("small") / "parent", **shape)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"damaged_{folder.name}"))

    return copy
