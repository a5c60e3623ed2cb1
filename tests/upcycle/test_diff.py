"""Two models side by side: what differs is listed, what is equal is counted, and one that was made from the other is known."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moexpand.base.errors import DONE, WRONG_INPUT
from moexpand.cli import main
from moexpand.upcycle.count import count
from moexpand.upcycle.diff import diff
from moexpand.upcycle.families import PRESETS
from moexpand.upcycle.models import find_model


def compare(left: object, right: object) -> Any:
    return diff(find_model(str(left)), find_model(str(right)))


def as_json(capsys: pytest.CaptureFixture[str], left: object, right: object) -> dict[str, Any]:
    assert main(["diff", f"left={left}", f"right={right}", "format=json"]) == DONE
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_keys_that_differ_are_listed_and_the_others_counted() -> None:
    found = compare("Qwen3-VL-235B-A22B", "Intern-S1-Pro")
    assert found.keys["text_config.num_experts"] == {"left": 128, "right": 512}
    assert found.keys["text_config.vocab_size"] == {"left": 151_936, "right": 155_008}
    assert found.keys["text_config.router_n_groups"] == {"right": 8}
    assert found.keys["vision_config.deepstack_visual_indexes"] == {"left": [8, 16, 24]}
    assert found.keys["text_config.rope_scaling.num_inv_freq"] == {"right": None}
    assert "text_config.hidden_size" not in found.keys
    assert "text_config" not in found.keys


def leaves(value: Any, path: tuple[str, ...] = ()) -> set[tuple[tuple[str, ...], str]]:
    """Every value of a config with the keys that lead to it."""
    if isinstance(value, dict) and value:
        return set().union(*(leaves(inner, (*path, key)) for key, inner in value.items()))
    return {(path, json.dumps(value))}


@pytest.mark.parametrize(("left", "right"), list(pairwise([*PRESETS, *PRESETS][: len(PRESETS) + 1])))
def test_nothing_is_lost_between_equal_and_different(left: str, right: str) -> None:
    ours, theirs = leaves(PRESETS[left]), leaves(PRESETS[right])
    found = compare(left, right)
    assert found.equal == len(ours & theirs)
    assert set(found.keys) == {".".join(path) for path, _ in ours ^ theirs}


def test_a_model_differs_in_nothing_from_itself(small_parent: Path) -> None:
    found = compare(small_parent, small_parent)
    assert not found.keys
    assert found.equal > 20
    assert found.descent is None
    assert all(here == there for here, there in found.sizes.values())


def test_absent_is_another_thing_than_null(tmp_path: Path) -> None:
    config = PRESETS["Qwen3-30B-A3B"]
    (tmp_path / "without.json").write_text(json.dumps({key: value for key, value in config.items() if key != "rope_scaling"}))
    found = compare("Qwen3-30B-A3B", tmp_path / "without.json")
    assert found.keys == {"rope_scaling": {"left": None}}
    assert found.equal == len(config) - 1


def test_sizes_are_those_of_count_with_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "Qwen3-30B-A3B", "Qwen3-30B-A3B-x4")
    sizes = value["sizes"]
    left, right = (count(find_model(name)) for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B-x4"))
    for name in ("total", "active", "active_without_embedding", "per_expert", "buffers"):
        assert (sizes[name]["left"], sizes[name]["right"]) == (getattr(left, name), getattr(right, name))
    for name in left.parts:
        assert (sizes[name]["left"], sizes[name]["right"]) == (left.parts[name], right.parts[name])
    assert sizes["total"]["ratio"] == 117_542_959_104 / 30_532_122_624
    assert sizes["vision"]["ratio"] is None
    assert sizes["groups"] == {"left": 1, "right": 8, "ratio": 8.0}
    # per layer 9 tensors and 3 for every expert; 3 more; keys and values of 48 layers x 4 heads x 128, 2 bytes each
    assert sizes["tensors"] == {"left": 48 * (9 + 384) + 3, "right": 48 * (9 + 1536) + 3, "ratio": 74_163 / 18_867}
    assert sizes["kv_cache_bytes_per_token_bf16"]["left"] == 2 * 48 * 4 * 128 * 2
    assert sizes["bytes_stored"] == {"left": None, "right": None, "ratio": None}


def test_stored_bytes_are_those_of_the_files(parent: Path, small_parent: Path) -> None:
    def stored(folder: Path) -> int:
        index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
        return int(index["metadata"]["total_size"])

    assert compare(parent, small_parent).sizes["bytes_stored"] == (stored(parent), stored(small_parent))


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_a_child_is_known_by_its_parents_fingerprint(
    order: tuple[str, str], parent: Path, children: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sides = dict(zip(order, (parent, children["halves_bits"]), strict=True))
    value = as_json(capsys, sides["left"], sides["right"])
    assert value["descent"] == {"parent": order[0], "child": order[1], "placement": "halves_bits"}
    assert main(["diff", f"left={sides['left']}", f"right={sides['right']}"]) == DONE
    assert f"moexpand verify source={parent} target={children['halves_bits']}" in capsys.readouterr().out


def test_children_of_others_are_no_children(parent: Path, small_parent: Path, children: dict[str, Path], tmp_path: Path) -> None:
    assert compare(small_parent, children["halves_bits"]).descent is None
    assert compare(children["halves_tile"], children["halves_bits"]).descent is None
    assert compare("Qwen3-30B-A3B", children["halves_bits"]).descent is None
    assert compare(parent, children["halves_bits"] / "config.json").descent is None


@pytest.mark.parametrize(
    "pair", [("Qwen3-30B-A3B", "Qwen3-30B-A3B-x4"), ("Qwen3-VL-235B-A22B", "Intern-S1-Pro"), ("folder", "folder")]
)
def test_both_formats_show_the_same(pair: tuple[str, str], small_parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = (str(small_parent) if name == "folder" else name for name in pair)
    value = as_json(capsys, left, right)
    assert main(["diff", f"left={left}", f"right={right}"]) == DONE
    table = capsys.readouterr().out
    lines = {" ".join(line.split()) for line in table.splitlines()}
    for name, size in value["sizes"].items():
        row = " ".join([name.replace("_", " "), *(f"{size[side]:,}" for side in ("left", "right") if size[side] is not None)])
        assert any(f"{line} ".startswith(f"{row} ") for line in lines) == bool(size["left"] or size["right"]), row
    for key, sides in value["different_keys"].items():
        (line,) = (line for line in lines if line.startswith(f"{key} "))
        assert ("(none)" in line) == (len(sides) < 2)
    assert f"{value['equal_keys']} {'other ' * bool(value['different_keys'])}keys are equal." in lines
    assert max(map(len, table.splitlines())) <= 110


def test_what_is_no_model_is_refused_on_either_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (
        ["left=Qwen3-30B", "right=Intern-S1"],
        ["left=Intern-S1", "right=Qwen3-30B"],
        [f"left={tmp_path}", "right=Intern-S1"],
    ):
        assert main(["diff", *words]) == WRONG_INPUT
        error = capsys.readouterr().err
        assert "did you mean Qwen3-30B-A3B?" in error or str(tmp_path) in error
        assert error.count("\n") == 1
