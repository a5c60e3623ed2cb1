"""Whatever is wrong ends `moexpand upcycle` with one sentence and its code: nothing half done, the source untouched."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moexpand.base.errors import DONE, ENVIRONMENT, WRONG_INPUT
from moexpand.upcycle import writer
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.plan import read_plan
from tests.parents import TINY, make_parent
from tests.upcycle.conftest import Run
from tests.upcycle.disks import disk_of, read_only_disk
from tests.upcycle.expanding import hashes, write_parent

MISTAKES = [
    (["num_groups=3"], r"num_groups=3 does not divide top-8, .*num_groups may be 4, 8 \(nearest: 4\)"),
    (["num_groups=2"], r"shows each of 4 parts in equally many groups, .*num_groups may be 4, 8 \(nearest: 4\)"),
    (["placement=full_copy"], r"would put 4/8 copies of an expert into a group, .*num_groups may be 1, 2, 4 \(nearest: 4\)"),
    (["num_experts=130"], "num_experts=130 is not a multiple of the parent's 32, .*give 128 or 160, or choose the copies"),
    (["num_experts=130", "placement=map", "map=m.json"], r"does not divide num_experts=130, .*may be 1, 2 \(nearest: 2\)"),
    (["num_experts=32"], "num_experts=32 is what .* has; .*regroup=true"),
    (["num_experts=16"], "num_experts=16 is less than the parent's 32"),
    (["regroup=true"], "regroup=true keeps the 32 experts"),
    (["placement=blocks_spread"], "did you mean block_spread"),
    (["placement=map"], "placement=map needs map=FILE"),
    (["placement=usage"], "placement=usage needs usage=FILE or calibration=FOLDER"),
    (["placement=ranked"], "placement=ranked .*give calibration=FOLDER"),
    (["map=map.json"], "placement=quarters_spread would ignore it"),
    (["router_noise=1e-9"], "router_noise=1e-09 would be lost in weights stored as F32"),
    (["vocab_size=100"], "vocab_size=100 differs from the parent's 64 rows, .*give the child's tokenizer as tokenizer=FOLDER"),
    (["max_shard_size=5parsecs"], "'5parsecs' is not a size; write for instance 5GB or 512MiB"),
    (["plan=nowhere.json"], r"nowhere\.json does not exist"),
    (["calibration=nowhere"], "nowhere is not a calibration folder"),
    (["seeds=1"], "did you mean seed"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_sentence(top8_parent: Path, refused: Callable[..., str], words: list[str], says: str) -> None:
    given = words if any(word.startswith(("num_experts", "plan=")) for word in words) else ["num_experts=128", *words]
    assert re.search(says, refused(top8_parent, *given))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("map", [*range(1, 32)] * 4 + [1, 2, 3, 4], r"map\.json: no slot of layer 0 copies expert 0; every expert .* needs one"),
        ("map", [*range(32)] * 3, r"map\.json: the list of layer 0 has 96 numbers, but there are 128 slots"),
        ("map", [[*range(32)] * 4], r"map\.json holds 1 lists, but the parent has 2 layers with experts"),
        ("map", [*range(32)] * 3 + [*range(31), 32], r"map\.json: slot 127 of layer 0 copies 32"),
        ("usage", [1] * 31, r"usage\.json: the list of layer 0 has 31 numbers, but there are 32 experts"),
        ("usage", [1] * 31 + [-1], r"usage\.json: the usage of expert 31 in layer 0 is -1"),
        ("usage", {"0": [1] * 32}, r"usage\.json: layer 1 is absent"),
    ],
)
def test_a_file_that_is_wrong_is_named(
    top8_parent: Path, refused: Callable[..., str], tmp_path: Path, key: str, value: object, says: str
) -> None:
    (tmp_path / f"{key}.json").write_text(json.dumps(value))
    assert re.search(says, refused(top8_parent, "num_experts=128", f"placement={key}", f"{key}={tmp_path / key}.json"))


def test_noise_that_bf16_swallows_is_refused_or_goes_to_a_float32_router(
    small_parent: Path, refused: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    words = ["num_experts=32", "num_groups=2", "placement=block", "router_noise=0.0001"]
    said = refused(small_parent, *words)
    assert "would be lost in weights stored as BF16" in said
    assert "use at least 0.00196, or router_dtype=float32" in said
    target = tmp_path / "child"
    assert run("upcycle", f"source={small_parent}", f"target={target}", *words, "router_dtype=float32")[0] == DONE
    child, parent = open_checkpoint(target), open_checkpoint(small_parent)
    name = "model.layers.1.mlp.gate.weight"
    assert child.info(name).dtype == "F32"
    rows = parent.read_numpy(name).astype(np.float64)[read_plan(target / "expansion.json").slot_to_parent[1], :]
    moved = np.linalg.norm(child.read_numpy(name) - rows, axis=1) / np.linalg.norm(rows, axis=1)
    assert (moved == 0).sum() == 8
    assert moved[moved > 0].mean() == pytest.approx(1e-4, rel=0.2)
    assert run("verify", f"source={small_parent}", f"target={target}")[0] == DONE


def test_a_calibration_of_another_parent_is_refused(
    top8_parent: Path, calibration: Path, refused: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    shape = TINY | {"experts": 32, "top_k": 8, "layers": 2}
    other = make_parent(tmp_path / "other", **shape, seed=9)
    says = f"{calibration} was made with another parent than {other}; calibrate this one"
    assert says in refused(other, "num_experts=128", f"calibration={calibration}")
    plan = tmp_path / "plan.json"
    words = ["num_experts=128", "dry_run=true", f"plan_out={plan}"]
    assert run("upcycle", f"source={other}", f"target={tmp_path / 'child'}", *words)[0] == DONE
    assert says in refused(other, f"plan={plan}", f"calibration={calibration}")


def _truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _header_with_a_key_twice(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    name, entry = next((name, entry) for name, entry in json.loads(header).items() if name != "__metadata__")
    twice = header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])


def _index_that_lies(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _not_renormalised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncated, r"model-00002-of-00002\.safetensors is truncated: it ends at byte [\d,]+, but \S+ ends at"),
        (_header_with_a_key_twice, r"model-00001-of-00002\.safetensors holds '\S+' twice in its header"),
        (_index_that_lies, r"holds model\.norm\.weight, but model\.safetensors\.index\.json puts it in model-00001"),
        (_not_renormalised, "has norm_topk_prob=false: copies would shrink the experts' output 4-fold"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), r"model-00001-of-00002\.safetensors is missing"),
    ],
)
def test_a_damaged_source_is_named(
    top8_parent: Path, damaged: Callable[[Path], Path], refused: Callable[..., str], damage: Callable[[Path], object], says: str
) -> None:
    folder = damaged(top8_parent)
    damage(folder)
    for words in ([], ["dry_run=true"]):
        assert re.search(says, refused(folder, "num_experts=128", *words))


def test_a_target_that_exists_is_refused_and_left_alone(top8_parent: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    says = f"{target} exists already and is not an empty folder"
    assert says in refused(top8_parent, "num_experts=128", target=target)
    assert says in refused(top8_parent, "num_experts=128", "dry_run=true", target=target)
    assert "taken" in refused(top8_parent, "num_experts=128", "resume=true", target=target)
    assert hashes(target).keys() == {"thesis.txt"}


def test_a_target_inside_the_source_is_refused(top8_parent: Path, run: Run) -> None:
    before = hashes(top8_parent)
    for target in (top8_parent / "child", top8_parent / ".." / top8_parent.name / "a" / "b"):
        code, _, said = run("upcycle", f"source={top8_parent}", f"target={target}", "num_experts=128", "resume=true")
        assert code == WRONG_INPUT
        assert "lies in the source" in said
    assert hashes(top8_parent) == before


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with disk_of(20 << 20, tmp_path / "disk", monkeypatch) as folder:
        yield folder


@pytest.fixture(scope="module")
def large_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent whose child takes 25 MB, in shards of at most 2 MB each."""
    return write_parent(tmp_path_factory.mktemp("large") / "parent", layers=2, hidden=512, intermediate=256, shard="4MB")


LARGE = ["num_experts=16", "num_groups=2", "placement=block", "workers=1", "reflink=never"]


def test_a_full_disk_is_found_before_anything_is_written(
    large_parent: Path, small_disk: Path, refused: Callable[..., str]
) -> None:
    said = refused(large_parent, *LARGE, code=ENVIRONMENT, target=small_disk / "child")
    assert re.search(r"needs [\d,]+ bytes, but only [\d,]+ are free on the disk of", said)


def test_a_dry_run_warns_of_a_full_disk(large_parent: Path, small_disk: Path, run: Run) -> None:
    code, out, _ = run("upcycle", f"source={large_parent}", f"target={small_disk / 'child'}", *LARGE, "dry_run=true")
    assert code == DONE
    assert "WARNING: the target's disk has too little free space" in out
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("shard", "kept"), [("100MB", False), ("2MB", True)])
def test_a_disk_that_fills_up_on_the_way_leaves_what_resume_can_use(
    large_parent: Path, small_disk: Path, run: Run, monkeypatch: pytest.MonkeyPatch, shard: str, kept: bool
) -> None:
    monkeypatch.setattr(writer, "check_space", lambda target, size: None)  # as when another program fills the disk meanwhile
    before, target = hashes(large_parent), small_disk / "child"
    code, _, said = run("upcycle", f"source={large_parent}", f"target={target}", *LARGE, f"max_shard_size={shard}")
    assert code == ENVIRONMENT
    assert re.fullmatch(r"moexpand: The disk is full while [^\n]*\.\n", said), said
    assert not target.exists()
    assert hashes(large_parent) == before
    assert ("resume=true goes on" in said) == kept
    assert ("nothing was left behind" in said) == (not kept)
    assert bool(list(small_disk.iterdir())) == kept


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with read_only_disk(tmp_path / "disk", monkeypatch) as folder:
        yield folder


@pytest.mark.parametrize("words", [[], ["dry_run=true"]])
def test_a_read_only_target_is_an_environment_failure(
    top8_parent: Path, read_only: Path, refused: Callable[..., str], words: list[str]
) -> None:
    said = refused(top8_parent, "num_experts=128", *words, code=ENVIRONMENT, target=read_only / "child")
    assert said.startswith("Read-only file system while ")
    assert str(read_only) in said
