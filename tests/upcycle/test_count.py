"""Counts equal the published figures, the sizes of real folders, and transformers' own parameters."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.base.errors import DONE, WRONG_INPUT, InputError
from moexpand.cli import main
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.count import PARTS, count, stored
from moexpand.upcycle.families import PRESETS
from moexpand.upcycle.family import part_of
from moexpand.upcycle.models import find_model
from tests.parents import TINY, make_parent

EXPANSIONS = ("Qwen3-30B-A3B-x4", "Qwen3-235B-A22B-x4", "Qwen3-VL-235B-A22B-x4", "Intern-S1-x4")


@pytest.mark.parametrize(
    ("preset", "total", "vision", "active", "without_embedding"),
    [
        ("Qwen3-30B-A3B", 30_532_122_624, 0, 3_353_032_704, 3_041_867_776),
        ("qwen3-30b-a3b-x4", 117_542_959_104, 0, 3_390_781_440, 3_079_616_512),
        ("Qwen3-235B-A22B", 235_093_634_560, 0, 22_190_763_520, 21_568_433_664),
        ("Qwen3-235B-A22B-x4", 916_530_671_104, 0, 22_338_612_736, 21_716_282_880),
        ("Qwen3-VL-235B-A22B", 235_670_022_896, 576_388_336, 22_190_763_520, 21_568_433_664),
        ("Intern-S1", 235_104_120_320 + 5_605_735_808, 5_605_735_808, 22_201_249_280, 21_573_676_544),
        ("INTERN-S1-PRO", 916_895_644_160, 339_807_232, 22_363_778_560, 21_728_865_792),
    ],
)
def test_presets_have_the_published_figures(preset: str, total: int, vision: int, active: int, without_embedding: int) -> None:
    result = count(find_model(preset))
    assert (result.total, result.active, result.active_without_embedding) == (total, active, without_embedding)
    assert result.subtotals == {"text": total - vision, "vision": vision, "time_series": 0}
    assert sum(result.parts.values()) == total
    assert sum(result.active_parts.values()) == active


@pytest.mark.parametrize(
    ("preset", "attention", "router", "expert", "experts", "layer", "embedding"),
    [
        ("Intern-S1-Pro", 71_303_424, 2_097_152, 18_874_368, 9_663_676_416, 9_737_085_184, 634_912_768),
        ("Qwen3-VL-235B-A22B", 71_303_424, 524_288, 18_874_368, 2_415_919_104, 2_487_755_008, 622_329_856),
        ("Intern-S1", 71_303_424, 524_288, 18_874_368, 2_415_919_104, 2_487_755_008, 627_572_736),
        ("Qwen3-30B-A3B", 18_874_624, 262_144, 4_718_592, 603_979_776, 623_120_640, 311_164_928),
        ("Qwen3-30B-A3B-x4", 18_874_624, 1_048_576, 4_718_592, 2_415_919_104, 2_435_846_400, 311_164_928),
    ],
)
def test_layers_have_the_published_figures(
    preset: str, attention: int, router: int, expert: int, experts: int, layer: int, embedding: int
) -> None:
    model = find_model(preset)
    result = count(model)
    (kind,) = result.layers
    assert kind.layers == list(range(model.architecture.num_hidden_layers))
    assert (kind.parts["attention"], kind.parts["router"], kind.parts["experts"]) == (attention, router, experts)
    assert (kind.total, result.per_expert, result.parts["embedding"]) == (layer, expert, embedding)
    # 2 norms a layer are in it; the last norm is not
    assert result.subtotals["text"] == len(kind.layers) * layer + 2 * embedding + model.architecture.hidden_size


def test_tables_of_fope_are_no_parameters() -> None:
    """4 heads x 45 frequencies squared, of sines and cosines."""
    assert count(find_model("Intern-S1-Pro")).buffers == 2 * 4 * 45 * 45
    assert not any(count(find_model(name)).buffers for name in PRESETS if name != "Intern-S1-Pro")


@pytest.mark.parametrize("preset", [*PRESETS, *EXPANSIONS])
def test_every_tensor_belongs_to_a_part(preset: str) -> None:
    assert {part_of(name) for name in find_model(preset).shapes()} <= {*PARTS, "buffers"}


def meta_model(preset: str, **text: Any) -> torch.nn.Module:
    """A preset's model as transformers builds it, without memory for its weights."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    config = copy.deepcopy(PRESETS[preset])
    config.get("text_config", config).update(text)
    with torch.device("meta"):
        if preset.startswith("Qwen3-VL"):
            return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))
        if preset == "Intern-S1-Pro":  # the decoder and tower of Qwen3-VL, without DeepStack
            config["vision_config"] |= {"deepstack_visual_indexes": [], "model_type": "qwen3_vl_moe"}
            config["text_config"] |= {"model_type": "qwen3_vl_moe_text", "rope_scaling": None}
            return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config))
        if preset == "Intern-S1":
            vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
            whole = InternVLConfig(vision_config=vision, text_config=config["text_config"], tie_word_embeddings=False)
            return InternVLForConditionalGeneration(whole)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def assert_same(result: Any, model: torch.nn.Module, experts: int, top_k: int) -> None:
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unvisited = sum(number for name, number in numbers.items() if ".mlp.experts." in name) * (experts - top_k) // experts
    towers = ("visual", "vision_tower", "projector")
    decoder = sum(number for name, number in numbers.items() if not any(tower in name for tower in towers))
    assert result.total == sum(numbers.values())
    assert result.subtotals["text"] == decoder
    assert result.active == decoder - unvisited
    assert result.active_without_embedding == result.active - sum(n for name, n in numbers.items() if "embed_tokens" in name)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_count_like_the_models_that_transformers_builds(preset: str) -> None:
    arch = find_model(preset).architecture
    assert_same(count(find_model(preset)), meta_model(preset), arch.num_experts, arch.num_experts_per_tok)


@pytest.mark.parametrize("preset", ["Qwen3-30B-A3B", "Qwen3-VL-235B-A22B", "Intern-S1"])
def test_layers_without_experts_count_like_those_of_transformers(preset: str, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 9, "decoder_sparse_step": 2, "mlp_only_layers": [0, 3, 4]}
    config = copy.deepcopy(PRESETS[preset])
    config.get("text_config", config).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = count(find_model(str(tmp_path / "config.json")))
    assert_same(result, meta_model(preset, **changes), 128, 8)
    with_experts, without = sorted(result.layers, key=lambda kind: "dense" in kind.parts)
    assert (with_experts.layers, without.layers) == ([1, 5, 7], [0, 2, 3, 4, 6, 8])
    assert result.parts["dense"] == 6 * without.parts["dense"]
    assert "router" not in without.parts


def test_a_folder_counts_its_tensors(parent: Path, children: dict[str, Path], small_parent: Path) -> None:
    for folder, item in ((parent, 4), (children["halves_bits"], 4), (small_parent, 2)):
        checkpoint = open_checkpoint(folder)
        assert count(find_model(str(folder))).total * item == checkpoint.nbytes == stored(checkpoint).nbytes


def test_stored_figures_are_those_of_the_files(small_parent: Path) -> None:
    shards = [load_file(file) for file in sorted(small_parent.glob("*.safetensors"))]
    tensors = [tensor for shard in shards for tensor in shard.values()]
    result = stored(open_checkpoint(small_parent))
    assert (result.shards, result.tensors, result.scales, result.experts_layout) == (len(shards), len(tensors), 0, "split")
    numbers = sum(tensor.numel() for tensor in tensors)
    assert result.dtypes == {"BF16": {"tensors": len(tensors), "numbers": numbers, "bytes": 2 * numbers}}


def test_a_config_alone_counts_like_its_folder(children: dict[str, Path], tmp_path: Path) -> None:
    folder = children["halves_tile"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    alone, whole, bare = (count(find_model(str(path))) for path in (folder / "config.json", folder, tmp_path))
    assert alone == whole == bare


def test_a_shared_head_is_counted_once_and_stays_active(small_parent: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = count(find_model(str(small_parent)))
    model = AutoModelForCausalLM.from_pretrained(small_parent)
    assert result.total == sum(parameter.numel() for parameter in model.parameters())
    assert result.active_without_embedding == result.active
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert result.total - result.active == experts * (8 - 2) // 8


def test_scales_of_fp8_blocks_are_listed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_parent(tmp_path / "parent", **TINY | {"hidden": 160, "intermediate": 136, "max_shard_size": "1GB"})
    before = count(find_model(str(folder)))
    tensors: dict[str, torch.Tensor] = {}
    scales = 0
    for name, value in load_file(folder / "model.safetensors").items():
        tensors[name] = value
        if "_proj." in name:
            blocks = [-(-size // 128) for size in value.shape]
            tensors |= {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(blocks)}
            scales += blocks[0] * blocks[1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    files = stored(open_checkpoint(folder))
    assert count(find_model(str(folder))) == before
    assert files.scales == scales > 0
    assert files.dtypes["F8_E4M3"]["numbers"] + files.dtypes["F32"]["numbers"] == before.total + scales
    assert main(["count", f"model={folder}"]) == DONE
    table = capsys.readouterr().out
    assert f"scales: {scales:,} " in table
    assert "F8_E4M3" in table


def make_qwen3_vl(folder: Path) -> torch.nn.Module:
    """A tiny Qwen3-VL-MoE with a dense layer, its experts stacked as in the released files ([experts, in, out])."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "mlp_only_layers": [1],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    stacks = {
        name: value.transpose(1, 2).contiguous() if ".mlp.experts." in name else value.contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(stacks, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_vision_language_folder_counts_like_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_qwen3_vl(tmp_path / "vl")
    assert_same(count(find_model(str(tmp_path / "vl"))), model, 8, 2)
    assert main(["count", f"model={tmp_path / 'vl'}"]) == DONE
    assert "in 2 of 3 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Qwen3-30B", "Qwen3-30B-A3B"), ("Intern-S1-Pro-x4", "Intern-S1-Pro"), ("qwen3-30b-a3b-x1", "Qwen3-30B-A3B-x4")],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {nearest}") as error:
        find_model(name)
    assert error.value.exit_code == WRONG_INPUT


@pytest.mark.parametrize("name", ["", "x" * 5000, "/nowhere/at/all", "a\0b", "-x4"])
def test_a_name_that_is_like_nothing_lists_what_there_is(name: str) -> None:
    with pytest.raises(InputError, match=r"is no folder, no config.json and no preset; presets are Intern-S1, .*Intern-S1-x4"):
        find_model(name)


def test_an_expansion_of_a_preset_is_that_many_times_its_experts() -> None:
    base, five = (count(find_model(name)) for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B-x5"))
    assert five.parts["experts"] == 5 * base.parts["experts"]
    assert five.parts["router"] == 5 * base.parts["router"]
    assert five.active - base.active == 4 * base.parts["router"]
    assert find_model("qwen3-vl-235b-a22b-X4").architecture.router_n_groups == 8


def test_a_folder_goes_before_a_preset_of_its_name(small_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-30B-A3B").symlink_to(small_parent)
    monkeypatch.chdir(tmp_path)
    assert find_model("Qwen3-30B-A3B").kind == "folder"
    assert find_model("Qwen3-235B-A22B").kind == "preset"


def numbers_in(text: str) -> set[str]:
    return set(text.replace(":", " ").replace(", ", " ").split())


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Intern-S1-Pro", "folder"])
def test_both_formats_show_the_same_numbers(model: str, small_parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(small_parent) if model == "folder" else model
    assert main(["count", f"model={model}", "format=json"]) == DONE
    value = json.loads(capsys.readouterr().out)
    assert main(["count", f"model={model}"]) == DONE
    table = capsys.readouterr().out
    figures = [value[key] for key in ("total", "active", "active_without_embedding", "buffers", "per_expert", "bytes_bf16")]
    figures += [*value["parts"].values(), *value["active_parts"].values(), *value["subtotals"].values()]
    figures += value["layers"][0]["parts"].values()
    figures += [value["stored"]["nbytes"]] if value["stored"] else []
    assert not {f"{figure:,}" for figure in figures if figure} - numbers_in(table)


def test_json_has_every_key_whatever_the_model(small_parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for model in (small_parent, small_parent / "config.json", "Intern-S1-Pro"):
        assert main(["count", f"model={model}", "format=json"]) == DONE
        found.append(json.loads(capsys.readouterr().out))
    assert list(found[0]) == list(found[1]) == list(found[2])
    assert [value["kind"] for value in found] == ["folder", "config", "preset"]
    assert all(list(value["parts"]) == list(value["active_parts"]) == list(PARTS) for value in found)
    assert [value["stored"] is None for value in found] == [False, True, True]


@pytest.mark.parametrize("model", [*PRESETS, *EXPANSIONS])
def test_the_table_fits_a_terminal(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", f"model={model}"]) == DONE
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
