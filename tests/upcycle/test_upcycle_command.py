"""`moexpand upcycle` as a user meets it: plan first, one sentence for each mistake, nothing half done, the source untouched."""

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from moexpand.base.errors import DONE, ENVIRONMENT, WRONG_INPUT
from moexpand.cli import main
from moexpand.upcycle import writer
from moexpand.upcycle.calibration import read_calibration
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.planner import predict_step_zero
from moexpand.upcycle.safetensors_file import TensorInfo
from tests import closed_form
from tests.commands import ROOT, moexpand, sentence
from tests.parents import TINY, make_parent
from tests.trained_tokenizers import TEXTS
from tests.upcycle.expanding import hashes, write_parent

Run = Callable[..., tuple[int, str, str]]
SHARDS = "max_shard_size=300KB"


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


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


# ---------------------------------------------------------------- plan first


def test_a_dry_run_reads_headers_writes_nothing_and_tells_the_exact_sizes(
    top8_parent: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "child"
    words = ["upcycle", f"source={top8_parent}", f"target={target}", "num_experts=128", SHARDS, "workers=3"]
    before = hashes(top8_parent)
    code, out, _ = run(*words, "dry_run=true")
    assert code == DONE
    assert list(tmp_path.iterdir()) == []
    assert hashes(top8_parent) == before
    said = {match[1]: int(match[2].replace(",", "")) for match in re.finditer(r"(model-\S+)\s+([\d,]+)", out)}
    total = int(re.search(r"([\d,]+) to write in (\d+) shards", out)[1].replace(",", ""))
    for words_of_a_plan in (
        f"{top8_parent} -> {target}: 32 -> 128 experts in 8 groups, quarters_spread; copies, router noise 0.05",
        f"{open_checkpoint(top8_parent).nbytes:,} bytes to read",
        "free on the target's disk",
        "MiB of memory with 3 workers",
        "a probe of the target's disk wrote",
        "Step 0: unknown without a calibration",
        f"Nothing was written to {target}",
    ):
        assert words_of_a_plan in out
    assert run(*words)[0] == DONE
    assert said == _sizes(target)
    assert len(said) > 2
    assert sum(said.values()) == total


@pytest.mark.parametrize(("placement", "routers"), [("halves_bits", False), ("quarters_spread", True)])
def test_planning_reads_vectors_and_where_needed_routers_and_no_other_matrix(
    top8_parent: Path, calibration: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, routers: bool
) -> None:
    seen: list[tuple[str, int, int]] = []
    real = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        done = real(descriptor, buffers, offset, *flags)
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, done))
        return done

    monkeypatch.setattr(os, "preadv", counted)
    code, *_ = run(
        "upcycle",
        f"source={top8_parent}",
        f"target={tmp_path / 'child'}",
        "num_experts=128",
        f"placement={placement}",
        "dry_run=true",
    )
    assert code == DONE
    infos = list(open_checkpoint(top8_parent).tensors.values())
    read = {_holder(infos, *place) for place in seen if place[0].startswith(str(top8_parent))}
    vectors = {info.name for info in infos if len(info.shape) == 1}
    assert read == vectors | ({f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)} if routers else set())
    assert not any("experts" in name for name in read)


def _holder(infos: list[TensorInfo], file: str, offset: int, size: int) -> str:
    """The tensor that holds a range."""
    return next(info.name for info in infos if str(info.file) == file and info.start <= offset and offset + size <= info.stop)


def test_a_calibration_gives_the_prediction_that_it_implies(
    top8_parent: Path, calibration: Path, run: Run, tmp_path: Path
) -> None:
    words = ["upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", "num_experts=128", "dry_run=true"]
    said = {}
    for placement in ("quarters_spread", "block_spread", "halves_tile"):
        plan = tmp_path / f"{placement}.json"
        code, out, _ = run(*words, f"placement={placement}", f"calibration={calibration}", f"plan_out={plan}")
        assert code == DONE
        due = predict_step_zero(open_checkpoint(top8_parent), read_plan(plan), read_calibration(calibration))
        assert f"{due.gate_mass:.1%} of the parent's gate mass kept, {due.distinct:.2f} distinct experts a token" in out
        assert f"total variation of the combine weights {due.total_variation:.3f}" in out
        said[placement] = json.loads(plan.read_text())["prediction"]
        assert said[placement]["total_variation"] == pytest.approx(due.total_variation)
        assert set(said[placement]["layers"]) == {"0", "1"}
    assert said["block_spread"]["total_variation"] < said["halves_tile"]["total_variation"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json" for name in sorted(said)]


def test_a_plan_is_reviewed_as_json_and_gives_the_same_bytes_again(top8_parent: Path, run: Run, tmp_path: Path) -> None:
    plan, source = tmp_path / "plan.json", f"source={top8_parent}"
    made = ["num_experts=128", "placement=random_balanced", "seed=7", "init=drop", "drop_fraction=0.25", "router_noise=0.01"]
    assert run("upcycle", source, f"target={tmp_path / 'one'}", *made, SHARDS, f"plan_out={plan}")[0] == DONE
    value = json.loads(plan.read_text())
    assert value["output"] == {"bytes": sum(_sizes(tmp_path / "one").values()), "shards": _sizes(tmp_path / "one")}
    assert value["prediction"] == "unknown"
    assert value["warnings"] == []
    assert run("upcycle", source, f"target={tmp_path / 'two'}", f"plan={plan}", SHARDS, "workers=1")[0] == DONE
    # Keys that say what the plan says anyway are no contradiction.
    assert run("upcycle", source, f"target={tmp_path / 'three'}", f"plan={plan}", SHARDS, *made)[0] == DONE
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")
    assert run("verify", source, f"target={tmp_path / 'two'}")[0] == DONE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["num_experts=256"], "num_experts=256 was given, but plan={plan} has num_experts=128; leave num_experts out"),
        (["num_groups=4"], "num_groups=4 was given, but plan={plan} has num_groups=8"),
        (["placement=block"], "placement=block was given, but plan={plan} has placement=halves_bits"),
        (["seed=1"], "seed=1 was given, but plan={plan} has seed=0"),
        (["router_noise=0.1"], "router_noise=0.1 was given, but plan={plan} has router_noise=0.0"),
        (["experts_layout=fused"], "experts_layout=fused was given, but plan={plan} has experts_layout=split"),
        (["map=map.json"], "map=map.json was given, but plan={plan} says what the child is; leave map out"),
        (["regroup=true"], "regroup=true was given, but plan={plan} says what the child is"),
    ],
)
def test_a_key_that_contradicts_a_plan_is_named(
    top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path, words: list[str], says: str
) -> None:
    plan = tmp_path / "plan.json"
    make = ["num_experts=128", "placement=halves_bits", "dry_run=true", f"plan_out={plan}"]
    assert run("upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", *make)[0] == DONE
    assert says.format(plan=plan) in refused(top8_parent, f"plan={plan}", *words)


def test_an_edited_map_needs_the_name_map(top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    plan, source, target = tmp_path / "plan.json", f"source={top8_parent}", tmp_path / "child"
    assert run("upcycle", source, f"target={target}", "num_experts=128", "dry_run=true", f"plan_out={plan}")[0] == DONE
    value = json.loads(plan.read_text())
    row = value["slot_to_parent"][1]
    row[0], row[-1] = row[-1], row[0]
    plan.write_text(json.dumps(value))
    assert 'a map of your own is a plan with "placement": "map"' in refused(top8_parent, f"plan={plan}")
    plan.write_text(json.dumps(value | {"placement": "map"}))
    assert run("upcycle", source, f"target={target}", f"plan={plan}")[0] == DONE
    code, out, _ = run("verify", source, f"target={target}")
    assert code == DONE
    assert "128 experts in 8 groups, map; copies, router noise 0.05" in out
    assert "Its map is taken from the plan as it stands." in out
    rows, theirs = (closed_form.weights_of(folder) for folder in (target, top8_parent))
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        ours = rows[f"model.layers.1.mlp.experts.0.{matrix}.weight"]
        assert (ours == theirs[f"model.layers.1.mlp.experts.{row[0]}.{matrix}.weight"]).all()


def test_a_plan_of_another_parent_is_refused(top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    make = ["num_experts=128", "dry_run=true", f"plan_out={plan}"]
    assert run("upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", *make)[0] == DONE
    other = make_parent(tmp_path / "other", **TINY | {"experts": 32, "top_k": 8, "layers": 2, "seed": 9})
    assert f"{plan} is for another parent than {other}: the fingerprints differ" in refused(other, f"plan={plan}")


# ---------------------------------------------------------------- bad input


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

DISK = 20 << 20


def _mounted(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """20 MiB: a tmpfs where mounting is permitted, elsewhere a folder that says so and fails beyond that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if _mounted(folder, f"size={DISK}"):
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    real, written = os.pwrite, [0]

    def limited(descriptor: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(os, "pwrite", limited)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=DISK, free=DISK))
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


def test_a_read_only_target_is_an_environment_failure(top8_parent: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = _mounted(folder, "ro")
    folder.chmod(0o555) if not mounted else None
    try:
        for words in ([], ["dry_run=true"]):
            said = refused(top8_parent, "num_experts=128", *words, code=ENVIRONMENT, target=folder / "child")
            assert re.search(r"^(Read-only file system|Permission denied) while ", said)
            assert str(folder) in said
    finally:
        subprocess.run(["umount", str(folder)], check=True) if mounted else folder.chmod(0o755)


# ---------------------------------------------------------------- another vocabulary


@pytest.fixture(scope="module")
def speaking_parent(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> Path:
    """A parent with a real tokenizer, three padding rows and the ids of its special tokens in config.json."""
    old = Tokenizer.from_file(str(tokenizer_folders["old"] / "tokenizer.json"))
    shape = TINY | {"experts": 8, "top_k": 4, "vocab": old.get_vocab_size() + 3}
    folder = make_parent(tmp_path_factory.mktemp("speaking") / "parent", **shape)
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": old.token_to_id("<|im_start|>"), "eos_token_id": old.token_to_id("<|im_end|>"), "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | ids))
    shutil.copyfile(tokenizer_folders["old"] / "tokenizer.json", folder / "tokenizer.json")
    (folder / "README.md").write_text("a parent")
    return folder


GROWN = ["num_experts=32", "num_groups=4", "placement=block"]


def test_a_grown_vocabulary_moves_rows_ids_and_tokenizer(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    source, target, new_folder = f"source={speaking_parent}", tmp_path / "child", tokenizer_folders["inserted"]
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (speaking_parent, new_folder))
    size = new.get_vocab_size() + 10
    code, out, _ = run("upcycle", source, f"target={target}", *GROWN, f"tokenizer={new_folder}", f"vocab_size={size}")
    assert code == DONE
    rows = old.get_vocab_size() + 3
    assert (
        f"vocabulary {rows:,} -> {size:,} rows: {old.get_vocab_size()} moved with their tokens, 2 averaged from pieces, " in out
    )
    config = json.loads((target / "config.json").read_text())
    assert config["vocab_size"] == size
    assert config["eos_token_id"] == new.token_to_id("<|im_end|>") != old.token_to_id("<|im_end|>")
    assert config["bos_token_id"] == new.token_to_id("<|im_start|>")
    assert (target / "tokenizer.json").read_bytes() == (new_folder / "tokenizer.json").read_bytes()
    assert (target / "README.md").read_text() == "a parent"
    ours, theirs = closed_form.weights_of(target), closed_form.weights_of(speaking_parent)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[name].shape == (size, 32)
        for token, number in new.get_vocab().items():
            if (ancestor := old.token_to_id(token)) is not None:
                assert (ours[name][number] == theirs[name][ancestor]).all()
        pieces = old.encode("<think>", add_special_tokens=False).ids
        assert ours[name][new.token_to_id("<think>")] == pytest.approx(theirs[name][pieces].mean(0), abs=1e-6)
        assert ours[name][-1] == pytest.approx(theirs[name][: old.get_vocab_size()].mean(0), abs=1e-6)
    code, out, _ = run("verify", source, f"target={target}")
    assert code == DONE


def test_a_child_with_permuted_tokens_speaks_as_one_without(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    """The same text gets the same logits, each under the id that its token has now."""
    tokenizers, logits = {}, {}
    for name, words in (("old", []), ("permuted", [f"tokenizer={tokenizer_folders['permuted']}"])):
        target = tmp_path / name
        assert run("upcycle", f"source={speaking_parent}", f"target={target}", *GROWN, *words)[0] == DONE
        tokenizers[name] = Tokenizer.from_file(str(target / "tokenizer.json"))
        model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
        with torch.no_grad():
            logits[name] = model(torch.tensor([tokenizers[name].encode(TEXTS[0]).ids])).logits[0]
    vocabulary = tokenizers["old"].get_vocab()
    moved = [tokenizers["permuted"].token_to_id(token) for token in vocabulary]
    assert moved != list(vocabulary.values())
    assert torch.equal(logits["old"][:, list(vocabulary.values())], logits["permuted"][:, moved])


def test_a_plan_with_a_vocabulary_takes_its_own_tokenizer_alone(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    plan, source = tmp_path / "plan.json", f"source={speaking_parent}"
    mine = f"tokenizer={tokenizer_folders['inserted']}"
    assert run("upcycle", source, f"target={tmp_path / 'one'}", *GROWN, mine, "vocab_size=450", f"plan_out={plan}")[0] == DONE
    assert run("upcycle", source, f"target={tmp_path / 'two'}", f"plan={plan}", mine)[0] == DONE
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    other = tokenizer_folders["permuted"]
    says = f"tokenizer={other} is not the one that plan={plan} was made with; give that one"
    assert says in refused(speaking_parent, f"plan={plan}", f"tokenizer={other}")
    code, out, _ = run("upcycle", source, f"target={tmp_path / 'three'}", f"plan={plan}")
    assert code == DONE
    assert "WARNING: the child's vocabulary is its own, and no tokenizer was given" in out
    assert not (tmp_path / "three" / "tokenizer.json").exists()
    assert run("verify", source, f"target={tmp_path / 'three'}")[0] == DONE


# ---------------------------------------------------------------- the program itself


def test_the_program_writes_and_proves_and_its_codes_tell(top8_parent: Path, tmp_path: Path) -> None:
    source, target = f"source={top8_parent}", tmp_path / "child"
    done = moexpand("upcycle", source, f"target={target}", "num_experts=128", SHARDS)
    assert (done.returncode, done.stderr) == (DONE, "")
    tensors = len(open_checkpoint(target).tensors)
    wrote = rf"Wrote {tensors} tensors in \d+ shards: [\d,]+ bytes read, [\d,]+ written in [\d.]+ s \(\d+ MB/s\)\."
    assert re.search(wrote, done.stdout)
    assert f"Prove it with: moexpand verify {source} target={target}" in done.stdout
    done = moexpand("verify", source, f"target={target}")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert "is exactly what its plan makes of" in done.stdout
    assert "Its map is what the placement's name calls for." in done.stdout
    info = open_checkpoint(target).info("model.layers.1.mlp.experts.77.up_proj.weight")
    with open(info.file, "r+b") as file:
        file.seek(info.start + 5)
        file.write(b"\x01\x02\x03")
    assert sentence(moexpand("verify", source, f"target={target}"), 1).startswith(
        f"{info.name} differs from the parent's up_proj"
    )
    assert "is not a folder" in sentence(moexpand("verify", f"source={tmp_path / 'none'}", f"target={target}"), 2)
    assert "holds no expansion.json" in sentence(moexpand("verify", source, source.replace("source", "target")), 2)


def test_on_a_terminal_there_is_a_bar_that_ends_full(top8_parent: Path, tmp_path: Path) -> None:
    for words in (
        ["upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", "num_experts=128"],
        ["verify", f"source={top8_parent}", f"target={tmp_path / 'child'}"],
    ):
        code, shown = _on_a_terminal(words)
        assert code == DONE, shown
        assert "100%" in shown
        assert ("expanding" if words[0] == "upcycle" else "verifying") in shown


def _on_a_terminal(words: list[str]) -> tuple[int, str]:
    main_end, child_end = pty.openpty()
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "moexpand", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=child_end, stdout=child_end, stderr=child_end) as process:
        os.close(child_end)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 65536)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not part:
                break
            shown += part
    os.close(main_end)
    return process.returncode, shown.decode()
