"""`verify` accepts what the writer wrote and names whatever was changed afterwards."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moexpand.base.errors import DIFFERENCE, DONE, WRONG_INPUT, CheckFailed, InputError
from moexpand.cli import main
from moexpand.upcycle import reading
from moexpand.upcycle.calibration import read_calibration
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.plan import Plan
from moexpand.upcycle.safetensors_file import TensorInfo
from moexpand.upcycle.verify import read_expansion, verify
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
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.gate\.weight differs from the plan's rows of .*, in row 77\.$"):
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
        (
            "expansion.json",
            lambda value: value["checksums_of_model_code"].update(a="0"),
            r"/a is missing, which expansion\.json names",
        ),
        (
            "expansion.json",
            lambda value: value["checksums_of_model_code"].popitem(),
            r"expansion\.json has no checksum for \w+_qwen3_moe_grouped\.py",
        ),
        ("expansion.json", lambda value: value["checksums"].update({"model.extra": "0"}), "model.extra, which is no tensor"),
        ("expansion.json", lambda value: value["slot_to_parent"][1].__setitem__(64, 0), "slot 64 of layer 1 to expert 0"),
        ("expansion.json", lambda value: value.update(placement="halves_tile"), "slot 1 of layer 0"),
        ("expansion.json", lambda value: value.update(parent="sha256:0"), "another parent"),
        ("expansion.json", lambda value: value.pop("seed"), "is not a plan"),
        ("expansion.json", lambda value: value.update(seed=1), "was changed since it was written: its plan has the checksum"),
        ("expansion.json", lambda value: value.update(checksum_of_plan="sha256:0"), "checksum_of_plan is sha256:0"),
        ("expansion.json", lambda value: value.update(checksum_algorithm="md5"), "checksum_algorithm='md5'"),
        ("expansion.json", lambda value: value["checksum_pieces"].update({ROUTER: 2}), ROUTER + " equals its recipe"),
        ("expansion.json", lambda value: value.pop("checksum_pieces"), "no table checksum_pieces"),
        ("expansion.json", lambda value: value.update(parent_groups=8), "parent_groups=8, but the parent routes in 1"),
        ("expansion.json", lambda value: value.update(prediction_of_ours=1), "prediction_of_ours, which no expansion writes"),
        ("model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1), r"'total_size': 1\}\} besides"),
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
    monkeypatch.setattr(reading, "PIECE", 4096)  # a matrix has 8,192 bytes
    child = make_child(parent, tmp_path / "child")
    for file in child.glob("model*"):
        assert file.read_bytes() == (children["halves_bits"] / file.name).read_bytes()
    monkeypatch.setattr(reading, "PIECE", 768)
    verify(parent, child)
    info = open_checkpoint(child).info(EXPERT.format(40))
    _write(info, b"\xff\xff", 5000)
    with pytest.raises(CheckFailed, match=r"experts\.40\.up_proj\.weight differs .* at its byte 5,00"):
        verify(parent, child)


# ---------------------------------------------------------------- one flipped bit anywhere

KINDS: dict[str, dict[str, Any]] = {
    "split": {"placement": "block_spread"},
    "fused": {"placement": "halves_bits", "experts_layout": "fused"},
    "noise": {"placement": "quarters_spread", "init": Init(router_noise=0.05, expert_noise=0.01, keep_first=False)},
    "drop, fused": {"placement": "quarters", "experts_layout": "fused", "init": Init(kind="drop", router_noise=0.02)},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A bf16 parent of 8 experts and its children of 32; tests that damage one mend it."""
    base = tmp_path_factory.mktemp("kinds")
    shape = TINY | {"top_k": 4, "layers": 2, "dtype": "bfloat16"}
    parent = make_parent(base / "parent", **shape)
    words = {"num_experts": 32, "num_groups": 4, "default_noise": False, "max_shard_size": "30KB"}
    folders = {kind: make_child(parent, base / f"child_{number}", **words | KINDS[kind]) for number, kind in enumerate(KINDS)}
    for child in folders.values():
        verify(parent, child)
    return parent, folders


@contextmanager
def _flipped(file: Path, at: int, bit: int) -> Iterator[None]:
    """One bit of a file is the other, inside the body."""

    def flip() -> None:
        with open(file, "r+b") as handle:
            handle.seek(at)
            byte = handle.read(1)[0]
            handle.seek(at)
            handle.write(bytes([byte ^ 1 << bit]))

    flip()
    try:
        yield
    finally:
        flip()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_in_any_tensor_is_named(kinds: tuple[Path, dict[str, Path]], kind: str, data: st.DataObject) -> None:
    parent, child = kinds[0], kinds[1][kind]
    tensors = open_checkpoint(child).tensors
    info = tensors[data.draw(st.sampled_from(list(tensors)))]
    at = data.draw(st.integers(0, info.nbytes - 1))
    with _flipped(info.file, info.start + at, data.draw(st.integers(0, 7))), pytest.raises(CheckFailed) as error:
        verify(parent, child)
    assert str(error.value).startswith(f"{info.name} differs ")
    assert f"at its byte {at:,}" in str(error.value)
    if len(info.shape) == 3:
        assert f" in slot {at // (info.nbytes // 32)} " in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_in_any_header_or_other_file_is_found(
    kinds: tuple[Path, dict[str, Path]], kind: str, data: st.DataObject
) -> None:
    parent, child = kinds[0], kinds[1][kind]
    sizes = {path: path.stat().st_size for path in sorted(child.iterdir())}
    sizes |= {info.file: info.start for info in reversed(open_checkpoint(child).tensors.values())}  # up to the first tensor
    file = data.draw(st.sampled_from(list(sizes)))
    at = data.draw(st.integers(0, len(file.read_bytes()[: sizes[file]].rstrip()) - 1))
    before = file.read_bytes()
    with _flipped(file, at, data.draw(st.integers(0, 7))):
        if file.suffix == ".json" and _json(before) == _json(file.read_bytes()):
            return  # 1e-06 and 1E-06 are one number
        with pytest.raises(CheckFailed) as error:
            verify(parent, child)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    names = [file.name, *(info.name for info in open_checkpoint(child).tensors.values() if info.file == file)]
    assert any(name in str(error.value) for name in names), str(error.value)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


def test_two_swapped_experts_of_a_stack_are_both_named(
    kinds: tuple[Path, dict[str, Path]], damaged: Callable[[Path], Path]
) -> None:
    child = damaged(kinds[1]["fused"])
    info = open_checkpoint(child).info("model.layers.1.mlp.experts.down_proj")
    rows = open_checkpoint(child).read_numpy(info.name)
    for slot, other in ((0, 30), (30, 0)):
        _write(info, rows[other].tobytes(), slot * rows[0].nbytes)
    with pytest.raises(CheckFailed) as error:
        verify(kinds[0], child)
    assert [f"{info.name} differs in slot {slot} from" in str(error.value) for slot in (0, 30, 29)] == [True, True, False]


def test_many_differences_are_counted(kinds: tuple[Path, dict[str, Path]], damaged: Callable[[Path], Path]) -> None:
    child = damaged(kinds[1]["split"])
    for slot in range(8):
        _write(open_checkpoint(child).info(EXPERT.format(slot)), b"\xff" * 4)
    with pytest.raises(CheckFailed, match=r"\(and 3 more\)\.$"):
        verify(kinds[0], child)


# ---------------------------------------------------------------- maps


def test_a_map_of_ones_own_is_accepted_under_that_name_alone(
    kinds: tuple[Path, dict[str, Path]], damaged: Callable[[Path], Path], tmp_path: Path
) -> None:
    parent, folders = kinds
    row = list(read_expansion(folders["split"]).plan.slot_to_parent[1])
    row[0], row[-1] = row[-1], row[0]
    (tmp_path / "map.json").write_text(json.dumps(row))
    own = make_child(parent, tmp_path / "own", num_experts=32, num_groups=4, placement="map", map=tmp_path / "map.json")
    proof = verify(parent, own)
    assert not proof.map_computed
    assert verify(parent, folders["split"]).map_computed
    for placement, says in (("block_spread", "maps slot 0 of layer 0 to expert"), ("ranked", "group 0 of layer 0 in a way that")):
        renamed = damaged(own) if placement == "block_spread" else own
        value = json.loads((renamed / "expansion.json").read_text()) | {"placement": placement}
        value["checksum_of_plan"] = Plan.from_json(value, "here").digest
        (renamed / "expansion.json").write_text(json.dumps(value))
        with pytest.raises(CheckFailed, match=rf'{says}.*"placement": "map"'):
            verify(parent, renamed)


@pytest.mark.parametrize("placement", ["block_spread", "ranked", "usage"])
def test_a_map_from_counts_is_computed_again_with_them(
    top8_parent: Path, calibration: Path, placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two slots of a group that changed places, the plan's checksum with them: only the counts can tell."""
    usage = tmp_path / "usage.json"
    usage.write_text(json.dumps([1 + expert % 4 for expert in range(32)]))
    key, source = ("usage", usage) if placement == "usage" else ("calibration", calibration)
    made_from = {key: usage if placement == "usage" else read_calibration(calibration)}
    child = make_child(top8_parent, tmp_path / "child", num_experts=128, placement=placement, **made_from)
    words = ["verify", f"source={top8_parent}", f"target={child}"]
    assert main(words) == DONE
    assert f"taken from the plan as it stands; {key}=F" in capsys.readouterr().out
    assert main([*words, f"{key}={source}"]) == DONE
    assert "Its map is what its placement calls for" in capsys.readouterr().out
    edited = json.loads((child / "expansion.json").read_text())
    row = edited["slot_to_parent"][1]
    row[0], row[1] = row[1], row[0]
    edited["checksum_of_plan"] = Plan.from_json(edited, "here").digest
    (child / "expansion.json").write_text(json.dumps(edited))
    assert main([*words, f"{key}={source}"]) == DIFFERENCE
    assert f"maps slot 0 of layer 1 to expert {row[0]}, but placement {placement} to {row[1]}" in capsys.readouterr().err


def test_counts_that_the_map_was_not_made_from_are_wrong_input(
    top8_parent: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = make_child(top8_parent, tmp_path / "child", num_experts=128, placement="block")
    (tmp_path / "usage.json").write_text(json.dumps([1] * 32))
    for word in (f"calibration={calibration}", f"usage={tmp_path / 'usage.json'}"):
        assert main(["verify", f"source={top8_parent}", f"target={child}", word]) == WRONG_INPUT
        said = capsys.readouterr().err
        assert f"{word} is sha256:" in said
        assert "expansion.json was made without one" in said
    assert main(["verify", f"source={top8_parent}", f"target={child}", "usage=nowhere.json"]) == WRONG_INPUT
    assert "nowhere.json does not exist" in capsys.readouterr().err
