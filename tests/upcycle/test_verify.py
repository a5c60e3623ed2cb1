"""`verify` accepts what the writer wrote and names whatever was changed afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.base.errors import DIFFERENCE, DONE, WRONG_INPUT, CheckFailed, InputError
from moexpand.cli import main
from moexpand.upcycle import verify as verifier
from moexpand.upcycle import writer
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.safetensors_file import TensorInfo
from moexpand.upcycle.verify import verify
from tests.parents import TINY, make_child, make_parent
from tests.upcycle.conftest import PLACEMENTS

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture
def child(children: dict[str, Path], damaged: Callable[[Path], Path]) -> Path:
    return damaged(children["halves_bits"])


def _write(info: TensorInfo, data: bytes, at: int = 0) -> None:
    with open(info.file, "r+b") as file:
        file.seek(info.start + at)
        file.write(data)


def _swap(checkpoint: Checkpoint, left: str, right: str) -> None:
    first, second = bytes(checkpoint.read_bytes(left)), bytes(checkpoint.read_bytes(right))
    _write(checkpoint.info(left), second)
    _write(checkpoint.info(right), first)


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_child_is_proven(parent: Path, children: dict[str, Path], placement: str) -> None:
    proof = verify(parent, children[placement])
    assert proof.tensors == 2 * (512 * 3 + 9) + 3
    assert proof.nbytes == open_checkpoint(children[placement]).nbytes


@pytest.mark.parametrize(
    "name",
    [
        EXPERT.format(0),
        EXPERT.format(511),
        ROUTER,
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_norm.weight",
    ],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_flipped_bit_is_found_and_its_tensor_named(parent: Path, child: Path, name: str, place: str) -> None:
    checkpoint = open_checkpoint(child)
    at = 0 if place == "first" else checkpoint.info(name).nbytes - 1
    _write(checkpoint.info(name), bytes([checkpoint.read_bytes(name)[at] ^ 1]), at)
    with pytest.raises(CheckFailed, match=name.replace(".", r"\.")):
        verify(parent, child)


def test_two_swapped_experts_are_both_named(parent: Path, child: Path) -> None:
    _swap(open_checkpoint(child), EXPERT.format(5), EXPERT.format(6))
    with pytest.raises(CheckFailed) as error:
        verify(parent, child)
    assert EXPERT.format(5) in str(error.value)
    assert EXPERT.format(6) in str(error.value)


def test_a_wrong_router_row_is_named(parent: Path, child: Path) -> None:
    checkpoint = open_checkpoint(child)
    rows = checkpoint.read_numpy(ROUTER)
    _write(checkpoint.info(ROUTER), rows[300].tobytes(), 77 * rows[0].nbytes)
    with pytest.raises(CheckFailed, match=r"mlp\.gate\.weight differs in 1 rows, first in row 77"):
        verify(parent, child)


def _drop(header: dict[str, Any]) -> None:
    header.pop("weight_map")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model.safetensors.index.json", lambda index: index["weight_map"].pop(EXPERT.format(3)), EXPERT.format(3)),
        (
            "model.safetensors.index.json",
            lambda index: index["weight_map"].update({"model.extra": "model-00001-of-00006.safetensors"}),
            "extra",
        ),
        ("model.safetensors.index.json", _drop, "no weight_map"),
        (
            "expansion.json",
            lambda value: value["checksums"].update({EXPERT.format(9): "0" * 64}),
            EXPERT.format(9) + " equals its recipe",
        ),
        ("expansion.json", lambda value: value["checksums"].update({ROUTER: "0" * 64}), ROUTER + " equals its recipe"),
        ("expansion.json", lambda value: value["checksums"].pop(ROUTER), "no checksum for " + ROUTER),
        ("expansion.json", lambda value: value["checksums"].update({"model.extra": "0"}), "model.extra, which is no tensor"),
        ("expansion.json", lambda value: value["slot_to_parent"][1].__setitem__(64, 0), "slot 64 of layer 1 to expert 0"),
        ("expansion.json", lambda value: value.update(placement="halves_tile"), "slot 1 of layer 0"),
        ("expansion.json", lambda value: value.update(parent="sha256:0"), "another parent"),
        ("expansion.json", lambda value: value.pop("seed"), "is not a plan"),
        ("config.json", lambda config: config.update(router_n_groups=4), "router_n_groups=4, but 8"),
        ("config.json", lambda config: config.update(rope_theta=1e4), r"rope_theta=10000\.0, but 1000000\.0"),
        ("config.json", lambda config: config.update(model_type="qwen3_moe"), "model_type='qwen3_moe', but 'qwen3_moe_grouped'"),
    ],
)
def test_a_changed_json_is_named(
    parent: Path, child: Path, file: str, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    _edit(child / file, change)
    with pytest.raises(CheckFailed, match=says):
        verify(parent, child)


@pytest.mark.parametrize("name", [EXPERT.format(17), ROUTER, "lm_head.weight", "model.layers.0.extra"])
def test_missing_and_extra_tensors_are_named(parent: Path, children: dict[str, Path], tmp_path: Path, name: str) -> None:
    tensors = {key: value for file in children["halves_bits"].glob("*.safetensors") for key, value in load_file(file).items()}
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(1)
    for file in children["halves_bits"].iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, tmp_path / file.name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckFailed, match=name.replace(".", r"\.")):
        verify(parent, tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "modeling_qwen3_moe_grouped.py"])
def test_side_files_and_model_code_are_compared(parent: Path, child: Path, file: str) -> None:
    with open(child / file, "a") as handle:
        handle.write(" ")
    with pytest.raises(CheckFailed, match=f"{file} differs"):
        verify(parent, child)
    (child / file).unlink()
    with pytest.raises(CheckFailed, match=f"{file} is missing"):
        verify(parent, child)


def test_a_parent_with_other_weights_is_told_apart(small_parent: Path, tmp_path: Path) -> None:
    one, other = (make_parent(tmp_path / str(seed), seed=seed, **TINY) for seed in (1, 2))
    child = make_child(one, tmp_path / "child", num_experts=16, num_groups=2, placement="halves_tile")
    verify(one, child)
    with pytest.raises(CheckFailed, match="another parent"):
        verify(other, child)


def test_a_folder_that_no_expansion_wrote_is_wrong_input(parent: Path) -> None:
    with pytest.raises(InputError, match=r"holds no expansion\.json"):
        verify(parent, parent)


def test_the_command_returns_the_codes_of_its_outcomes(parent: Path, child: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"source={parent}", f"target={child}"]) == DONE
    assert "exactly" in capsys.readouterr().out
    checkpoint = open_checkpoint(child)
    _write(checkpoint.info(ROUTER), b"\1\2\3")
    assert main(["verify", f"source={parent}", f"target={child}"]) == DIFFERENCE
    assert ROUTER in capsys.readouterr().err
    assert main(["verify", f"source={parent}", f"target={child / 'none'}"]) == WRONG_INPUT


def test_tensors_larger_than_a_piece_are_written_and_compared_whole(
    parent: Path, children: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PIECE", 1000)
    monkeypatch.setattr(verifier, "PIECE", 768)
    child = make_child(parent, tmp_path / "child")
    for file in child.glob("model*"):
        assert file.read_bytes() == (children["halves_bits"] / file.name).read_bytes()
    verify(parent, child)
    info = open_checkpoint(child).info(EXPERT.format(40))
    _write(info, b"\xff\xff", 5000)
    with pytest.raises(CheckFailed, match=r"experts\.40\.up_proj\.weight differs .* at its byte 5,00"):
        verify(parent, child)
