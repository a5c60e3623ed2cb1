"""The writer puts the parent's bytes where the plan says, whole or not at all."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moexpand.base.errors import ENVIRONMENT, WRONG_INPUT, EnvironmentFailure, InputError
from moexpand.base.files import sha256
from moexpand.cli import main
from moexpand.upcycle import writer
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.plan import Plan
from moexpand.upcycle.planner import Wishes, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.verify import read_expansion
from moexpand.upcycle.writer import expand
from tests.parents import TINY, make_child, make_parent
from tests.upcycle.conftest import PLACEMENTS
from tests.upcycle.disks import disk_of
from tests.upcycle.expanding import ROOT, write_parent

WISHES = Wishes(num_experts=512, num_groups=8, placement="halves_bits")
SIDE_FILES = ["generation_config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256(file) for file in folder.rglob("*") if file.is_file()}


def _parent_of(placement: str, slot: int) -> int:
    """The definition of model.md 1.4, slot by slot."""
    if placement == "halves_tile":
        return slot % 128
    pair, side, rank = slot // 128, slot // 64 % 2, slot % 64
    return [expert for expert in range(128) if (expert >> pair) % 2 == side][rank]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_slot_holds_its_parents_experts_and_router_row(parent: Path, children: dict[str, Path], placement: str) -> None:
    ours, theirs = _tensors(children[placement]), _tensors(parent)
    for layer in range(2):
        router = ours.pop(f"model.layers.{layer}.mlp.gate.weight")
        for slot in range(512):
            expert = _parent_of(placement, slot)
            assert torch.equal(router[slot], theirs[f"model.layers.{layer}.mlp.gate.weight"][expert])
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                copy = ours.pop(f"model.layers.{layer}.mlp.experts.{slot}.{matrix}.weight")
                assert torch.equal(copy, theirs[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"])
    rest = {name for name in theirs if ".experts." not in name and "mlp.gate." not in name}
    assert set(ours) == rest
    assert all(torch.equal(ours[name], theirs[name]) for name in rest)


def test_a_bf16_tied_parent_in_the_other_config_form_keeps_its_form(small_parent: Path, tmp_path: Path) -> None:
    child = make_child(small_parent, tmp_path / "child", num_experts=16, num_groups=2, placement="halves_tile")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (small_parent, child))
    assert "num_experts" not in after
    assert after.pop("num_local_experts") == 16
    assert after.pop("router_n_groups") == 2
    assert after.pop("model_type") == "qwen3_moe_grouped"
    assert after.pop("architectures") == ["Qwen3MoeGroupedForCausalLM"]
    assert set(after.pop("auto_map")) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert after.items() <= before.items()
    assert before.keys() - after.keys() == {"num_local_experts", "model_type", "architectures"}
    tensors = _tensors(child)
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_side_files_come_along_and_the_source_stays_as_it_was(parent: Path, tmp_path: Path) -> None:
    before = _hashes(parent)
    child = make_child(parent, tmp_path / "child")
    assert _hashes(parent) == before
    assert {name: _hashes(child)[name] for name in SIDE_FILES} == {name: before[name] for name in SIDE_FILES}
    named = json.loads((child / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file.name for file in child.glob("*.safetensors")} == set(named.values())
    assert sorted(set(named.values()))[0].startswith("model-00001-of-000")


def test_the_number_of_workers_does_not_change_a_byte(parent: Path, tmp_path: Path) -> None:
    folders = [make_child(parent, tmp_path / str(workers), workers=workers) for workers in (1, 2, 4)]
    assert _hashes(folders[0]) == _hashes(folders[1]) == _hashes(folders[2])


def test_shards_stay_below_the_size_asked_for(parent: Path, tmp_path: Path) -> None:
    child = make_child(parent, tmp_path / "child", max_shard_size="300KB")
    for file in child.glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 300_000


@pytest.mark.parametrize("size", ["5 parsecs", "-1GB", "0"])
def test_a_shard_size_that_is_none_is_refused(parent: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        make_child(parent, tmp_path / "child", max_shard_size=size)


def test_expansion_json_holds_the_plan_and_true_checksums(parent: Path, children: dict[str, Path]) -> None:
    import hashlib

    child = children["halves_bits"]
    record = json.loads((child / "expansion.json").read_text())
    assert record["placement"] == "halves_bits"
    assert [len(row) for row in record["slot_to_parent"]] == [512, 512]
    assert record["parent_groups"] == 1
    assert record["checksum_algorithm"] == "sha256"
    opened = open_checkpoint(child)
    assert set(record["checksums"]) == set(opened.tensors)
    for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.511.down_proj.weight"):
        assert record["checksums"][name] == hashlib.sha256(opened.read_bytes(name)).hexdigest()
    plan = make_plan(open_checkpoint(parent), WISHES)
    assert read_expansion(child).plan == plan == Plan.from_json(json.loads(json.dumps(plan.to_json())), "here")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "version 1"),
        ({"router_noise": "a lot"}, "router_noise='a lot'"),
        ({"extra": 1}, "extra is missing or unknown"),
        ({"slot_to_parent": [["a"]]}, "numbers"),
    ],
)
def test_a_plan_that_is_not_understood_is_refused(parent: Path, change: dict[str, object], says: str) -> None:
    plan = make_plan(open_checkpoint(parent), WISHES).to_json()
    with pytest.raises(InputError, match=says):
        Plan.from_json(plan | change, "plan.json")


def test_a_parent_that_cannot_be_expanded_is_refused(parent: Path, children: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was trained with it in group"):
        make_child(children["halves_bits"], tmp_path / "again", num_experts=1024, placement="block_spread")
    with pytest.raises(InputError, match="does not divide top-8"):
        make_child(parent, tmp_path / "groups", num_groups=3)
    plain = make_parent(tmp_path / "plain", norm_topk_prob=False, **TINY)
    with pytest.raises(InputError, match="norm_topk_prob=false"):
        make_child(plain, tmp_path / "child", num_experts=16, num_groups=2)


def test_an_existing_target_is_refused_and_left_alone(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        make_child(parent, tmp_path / "target")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["precious.txt"]


@pytest.fixture
def tiny_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with disk_of(8 << 20, tmp_path / "disk", monkeypatch) as folder:
        yield folder


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(parent: Path, tiny_disk: Path) -> None:
    with pytest.raises(EnvironmentFailure, match=r"needs .* bytes, but only .* are free"):
        make_child(parent, tiny_disk / "child")
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_fills_up_before_the_first_shard_is_done_leaves_nothing(
    parent: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "check_space", lambda target, size: None)
    with pytest.raises(EnvironmentFailure, match=r"disk is full .* nothing was left behind"):
        make_child(parent, tiny_disk / "child", max_shard_size="1GB")
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_fills_up_later_keeps_finished_shards_and_nothing_else(
    parent: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "check_space", lambda target, size: None)
    with pytest.raises(EnvironmentFailure, match=r"disk is full .* \d+ of \d+ shards are finished in .*resume=true goes on"):
        make_child(parent, tiny_disk / "child", max_shard_size="1MB")
    assert [path.name for path in tiny_disk.iterdir()] == [".child.expanding"]
    assert list(tiny_disk.glob(".child.expanding/work.*/writing/*")) == []
    assert list(tiny_disk.glob(".child.expanding/work.*/child/*")) != []


def test_a_failing_write_names_the_tensor_and_leaves_nothing(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, [0]

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(EnvironmentFailure, match=r"disk is full while writing model\.layers\.\d.* to model-000\d\d"):
        make_child(parent, tmp_path / "child", max_shard_size="1GB")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_an_environment_failure(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailure, match=r"Not a directory|File exists"):
        make_child(parent, tmp_path / "file" / "child")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_disk_is_an_environment_failure(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(EnvironmentFailure, match=r"Read-only file system while writing .*child"):
        make_child(parent, tmp_path / "child")
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_an_environment_failure(parent: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "moexpand",
        "upcycle",
        f"source={parent}",
        f"target={tmp_path / 'child'}",
        "max_shard_size=1GB",
    ]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == ENVIRONMENT, done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_while_it_is_read_is_an_environment_failure(
    parent: Path, tmp_path: Path, damaged: Callable[[Path], Path]
) -> None:
    folder = damaged(parent)
    opened = open_checkpoint(folder)
    recipe = Recipe(opened, make_plan(opened, WISHES))
    os.truncate(folder / "model-00004-of-00006.safetensors", 200_000)
    with pytest.raises(EnvironmentFailure, match=r"model-00004-of-00006\.safetensors holds nothing at byte .* cut since"):
        expand(recipe, tmp_path / "child")
    (folder / "model-00004-of-00006.safetensors").unlink()
    with pytest.raises(EnvironmentFailure, match=r"reading .*model-00004-of-00006\.safetensors"):
        expand(recipe, tmp_path / "child")
    assert not (tmp_path / "child").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak resident memory of the whole process at outputs of 0.2 and 0.7 GB, with two workers."""
    code = """
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.fresh_config import architecture_config
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.folder import write_checkpoint
from moexpand.upcycle.planner import Wishes, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.tensors import stored_tensors
from moexpand.upcycle.writer import expand
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
arch = Architecture(
    vocab_size=512, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=16, num_experts_per_tok=2, moe_intermediate_size=768,
)
shapes = stored_tensors(arch)
zeros = bytes(16 << 20)
tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
write_checkpoint(folder / "p", architecture_config(arch), tensors, lambda name: zeros[: 2 * prod(shapes[name])])
parent = open_checkpoint(folder / "p")
plan = make_plan(parent, Wishes(num_experts=32, num_groups=2, placement="halves_tile"))
expand(Recipe(parent, plan), folder / "c", workers=2)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    peaks = []
    for layers in (1, 4):
        folder = tmp_path / str(layers)
        folder.mkdir()
        run = subprocess.run([sys.executable, "-c", code, str(folder), str(layers)], capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout))
        shutil.rmtree(folder)
    assert peaks[1] < peaks[0] + 8 * 1024  # KiB
    assert peaks[1] < (256 + 2 * 64) * 1024


def test_source_bytes_are_read_once_and_output_bytes_written_once(tmp_path: Path) -> None:
    """By the kernel's count of a process whose parent is in no cache."""
    folder = write_parent(tmp_path / "parent", layers=6, hidden=512, intermediate=512, shard="20MB")
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    code = """
import sys
from pathlib import Path
from moexpand.upcycle.writer import expand
from tests.upcycle.expanding import recipe_of
def traffic():
    lines = dict(line.split(": ") for line in open("/proc/self/io"))
    return int(lines["read_bytes"]), int(lines["write_bytes"])
recipe = recipe_of(Path(sys.argv[1]))
before = traffic()
expand(recipe, Path(sys.argv[2]), workers=2, reflink="never")
print(*(now - then for now, then in zip(traffic(), before)))
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "child")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    read, written = map(int, run.stdout.split())
    source, target = (
        sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in (folder, tmp_path / "child")
    )
    assert read < 1.02 * source  # less where the folder of the test is in memory
    assert written < 1.02 * target


def test_the_command_says_what_is_wrong_in_one_sentence(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    for arguments in (
        [f"source={parent}", f"target={tmp_path / 'target'}"],
        [f"source={tmp_path / 'nowhere'}", f"target={tmp_path / 'child'}"],
        [f"source={parent}", f"target={tmp_path / 'child'}", "num_experts=500"],
    ):
        assert main(["upcycle", *arguments]) == WRONG_INPUT
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def test_a_dry_run_writes_the_plan_alone(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    assert main(["upcycle", f"source={parent}", f"target={tmp_path / 'child'}", "dry_run=true", f"plan_out={plan}"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.from_json(json.loads(plan.read_text()), "plan.json").num_experts == 512
