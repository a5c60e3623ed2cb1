"""Counts equal the published figures, the sizes of real folders, and transformers' own parameters."""

import json
from pathlib import Path

import pytest

from moexpand.base.errors import DONE, WRONG_INPUT, InputError
from moexpand.cli import main
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.count import count, shape_of


@pytest.mark.parametrize(
    ("preset", "total", "active", "without_embedding"),
    [
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704, 3_041_867_776),
        ("qwen3-30b-a3b-x4", 117_542_959_104, 3_390_781_440, 3_079_616_512),
        ("Qwen3-235B-A22B", 235_093_634_560, 22_190_763_520, 21_568_433_664),
        ("Qwen3-235B-A22B-x4", 916_530_671_104, 22_338_612_736, 21_716_282_880),
    ],
)
def test_presets_have_the_published_figures(preset: str, total: int, active: int, without_embedding: int) -> None:
    result = count(shape_of(preset))
    assert (result.total, result.active, result.active_without_embedding) == (total, active, without_embedding)
    assert sum(result.parts.values()) == total


def test_a_folder_counts_its_tensors(parent: Path, children: dict[str, Path], small_parent: Path) -> None:
    for folder, item in ((parent, 4), (children["halves_bits"], 4), (small_parent, 2)):
        assert count(shape_of(str(folder))).total * item == open_checkpoint(folder).nbytes


def test_a_config_alone_counts_like_its_folder(children: dict[str, Path], tmp_path: Path) -> None:
    folder = children["halves_tile"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert count(shape_of(str(folder / "config.json"))) == count(shape_of(str(folder))) == count(shape_of(str(tmp_path)))


def test_a_shared_head_is_counted_once_and_stays_active(small_parent: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = count(shape_of(str(small_parent)))
    model = AutoModelForCausalLM.from_pretrained(small_parent)
    assert result.total == sum(parameter.numel() for parameter in model.parameters())
    assert result.active_without_embedding == result.active
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert result.total - result.active == experts * (8 - 2) // 8


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean Qwen3-30B-A3B") as error:
        shape_of("Qwen3-30B")
    assert error.value.exit_code == WRONG_INPUT


def test_both_formats_show_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "model=Qwen3-30B-A3B", "format=json"]) == DONE
    value = json.loads(capsys.readouterr().out)
    assert main(["count", "model=Qwen3-30B-A3B"]) == DONE
    table = capsys.readouterr().out
    for number in (value["total"], value["active"], value["active_without_embedding"], value["parts"]["experts"]):
        assert f"{number:,}" in table
