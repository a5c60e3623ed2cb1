"""Parents and children that several tests read; tests that change one copy it first (`damaged`)."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moexpand.base.errors import WRONG_INPUT
from moexpand.cli import main
from tests.parents import TINY, make_child, make_parent
from tests.trained_tokenizers import SPECIALS, TEXTS, byte_level, permuted, saved
from tests.upcycle import calibrations
from tests.upcycle.expanding import hashes

Run = Callable[..., tuple[int, str, str]]

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


@pytest.fixture(scope="session")
def top8_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 experts, top-8, fp32: small, and every placement fits 128 experts in 8 groups."""
    shape = TINY | {"experts": 32, "top_k": 8, "layers": 2, "max_shard_size": "200KB"}
    return make_parent(tmp_path_factory.mktemp("top8") / "parent", **shape)


@pytest.fixture(scope="session")
def calibration(top8_parent: Path) -> Path:
    """A calibration folder of `top8_parent`: its own router logits of 160 tokens."""
    tokens = np.random.default_rng(2).integers(0, TINY["vocab"], (4, 40))
    logits = calibrations.routed(top8_parent, tokens, 8)
    return calibrations.write(top8_parent.with_name("calibration"), top8_parent, logits, 8)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"damaged_{folder.name}"))

    return copy


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`old`, and others: its tokens under other ids, the same with two more, and one trained on other texts."""
    base = tmp_path_factory.mktemp("tokenizers")
    old = byte_level(400)
    return {
        "old": saved(old, base / "old"),
        "permuted": saved(permuted(old), base / "permuted"),
        "inserted": saved(permuted(old, ("<think>", "<|ts|>")), base / "inserted"),
        "other": saved(byte_level(470, [*TEXTS[1:], "Wachsende Modelle, wachsende Modelle"], SPECIALS[::-1]), base / "other"),
    }


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: its exit code, what it printed, and what it said on standard error."""

    def command(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs an expansion that must fail, and checks what every failure leaves: one sentence, the source, and nothing else."""

    def command(source: Path, *words: object, code: int = WRONG_INPUT, target: Path | None = None) -> str:
        target = target or tmp_path / "folder" / "child"
        target.parent.mkdir(exist_ok=True)
        before, beside = hashes(source), sorted(target.parent.iterdir())
        found, _, said = run("upcycle", f"source={source}", f"target={target}", *words)
        assert found == code, said
        assert re.fullmatch(r"moexpand: [^\n]*[.?]\n", said), said
        assert sorted(target.parent.iterdir()) == beside
        assert hashes(source) == before
        return said.removeprefix("moexpand: ").rstrip("\n")

    return command
