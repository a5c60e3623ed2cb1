"""The presets of conf/model/ are the published models, and the engine builds them whole with every parameter in its place."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moexpand.base.errors import InputError
from moexpand.conf.check import check_train
from moexpand.conf.check_encoders import check_vision
from moexpand.conf.compose import compose
from moexpand.train.fresh import fresh_architecture
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.config_json import read_architecture
from moexpand.upcycle.families import PRESETS
from moexpand.upcycle.fresh_config import architecture_config

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
PUBLISHED = {
    "qwen3_30b_a3b": ("Qwen3-30B-A3B", 30_532_122_624),
    "qwen3_235b_a22b": ("Qwen3-235B-A22B", 235_093_634_560),
    "qwen3_vl_30b_a3b": ("Qwen3-VL-30B-A3B", None),
    "qwen3_vl_235b_a22b": ("Qwen3-VL-235B-A22B", 235_670_022_896),
    "interns1_pro": ("Intern-S1-Pro", 916_895_644_160),
}
"""Totals from the sums of the shapes; that of Qwen3-VL-30B is computed below."""


def architecture(preset: str, *words: str) -> Architecture:
    return fresh_architecture(compose("train", ["data.shards=x", "run.dir=y", f"model={preset}", *words]).model)


@pytest.mark.parametrize(
    ("preset", "word", "sentence"),
    [
        ("quickstart", "model.vision.depth=2", "is for model.family=qwen3_vl_moe or interns1_pro"),
        ("quickstart", "model.vision.deepstack_visual_indexes=[0]", "is for model.family=qwen3_vl_moe and has no effect on"),
        (
            "quickstart",
            "model.mrope_section=[8,8,8]",
            "is for model.family=qwen3_vl_moe and has no effect on model.family=qwen3_moe",
        ),
        (
            "quickstart",
            "model.fope_sep_head=false",
            "is for model.family=interns1_pro and has no effect on model.family=qwen3_moe",
        ),
        ("quickstart_vl", "model.fope_init_factor=0.1", "is for model.family=interns1_pro and has no effect on"),
        ("tiny_interns1_pro", "model.mrope_section=[2,3,3]", "has no effect on model.family=interns1_pro; leave it out"),
        ("tiny_interns1_pro", "model.vision.deepstack_visual_indexes=[0]", "is for model.family=qwen3_vl_moe"),
        ("tiny_qwen3_vl_30b_a3b", "model.family=interns1_pro", "model.vision.deepstack_visual_indexes=[0] is for"),
    ],
)
def test_keys_of_other_families_are_refused(preset: str, word: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        architecture(preset, word)
    assert sentence in str(caught.value)
    assert word in str(caught.value)


def tower_parameters(out: int) -> int:
    """Qwen3-VL's tower with DeepStack after three blocks, by hand."""
    h, inner, merged = 1152, 4304, 4 * 1152
    block = 4 * h + (h * 3 * h + 3 * h) + (h * h + h) + (h * inner + inner) + (inner * h + h)
    merger = (merged * merged + merged) + (merged * out + out)
    return (h * 3 * 2 * 16 * 16 + h) + 2304 * h + 27 * block + (2 * h + merger) + 3 * (2 * merged + merger)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_the_published_model(preset: str) -> None:
    config = PRESETS[PUBLISHED[preset][0]]
    found = architecture(preset)
    due = read_architecture(config)
    # width of layers without experts, of which there are none, and what a fresh model is initialised with
    due = replace(due, intermediate_size=0, dtype=found.dtype, initializer_range=found.initializer_range)
    assert found == due


@pytest.mark.parametrize("preset", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_config_json_of_a_fresh_model_reads_back_as_the_same_architecture(preset: str) -> None:
    arch = architecture(preset)
    again = read_architecture(architecture_config(arch))
    assert replace(again, intermediate_size=0) == arch


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_engine_builds_it_on_the_meta_device_with_the_exact_count(preset: str) -> None:
    from moexpand.parallel import ranks
    from moexpand.parallel.model import build_stages
    from moexpand.parallel.shape import Layout, RouterRules
    from moexpand.train.setup import shape_of

    shape = shape_of(architecture(preset))
    ranks.start(Layout())
    try:
        with torch.device("meta"):
            stages = build_stages(shape, Layout(), RouterRules(), torch.bfloat16)
    finally:
        ranks.stop()
    count = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
    due = PUBLISHED[preset][1] or 30_532_122_624 + tower_parameters(2048)
    assert count == due
    assert all(parameter.is_meta for parameter in stages[0].parameters())
    tables = [stages[0].rotary.sin_coef, stages[0].rotary.cos_coef] if shape.fope_frequencies else []
    assert [tuple(table.shape) for table in tables] == [(4, 45, 45)] * len(tables)


def test_the_towers_of_both_published_sizes_have_the_counts_of_the_formula() -> None:
    assert tower_parameters(4096) == 576_388_336


@pytest.mark.parametrize("preset", sorted(path.stem for path in FOLDER.glob("tiny_*.yaml")))
def test_a_tiny_preset_has_the_features_of_its_model(preset: str) -> None:
    tiny, large = architecture(preset), architecture(preset.removeprefix("tiny_"))
    for name in (
        "model_type",
        "num_experts",
        "num_experts_per_tok",
        "router_n_groups",
        "rope_theta",
        "fope_by_head",
        "norm_topk_prob",
    ):
        assert getattr(tiny, name) == getattr(large, name), name
    assert bool(tiny.fope_frequencies) == bool(large.fope_frequencies)
    assert bool(tiny.mrope_section) == bool(large.mrope_section)
    assert (tiny.vision is None) == (large.vision is None)
    if tiny.vision is not None and large.vision is not None:
        assert bool(tiny.vision.deepstack_visual_indexes) == bool(large.vision.deepstack_visual_indexes)
        assert tiny.vision.patch_size == large.vision.patch_size


@pytest.mark.parametrize(("experiment", "ranks", "gigabytes"), [("continue_1t_256", 256, 89), ("continue_1t_2048", 2048, 51)])
def test_the_full_size_experiments_fit_their_ranks(experiment: str, ranks: int, gigabytes: int) -> None:
    """A child of Qwen3-VL-235B-A22B, and a fresh Intern-S1-Pro, by the checks that a run starts with."""
    child = replace(architecture("qwen3_vl_235b_a22b"), num_experts=512, router_n_groups=8)
    config = compose("train", ["data.shards=x", "run.dir=y", f"experiment={experiment}"])
    for arch in (child, architecture("interns1_pro")):
        check_train(config, arch, ranks)
        check_vision(config, arch.vision)
    parallel, experts = config.parallel, 94 * 512 * 3 * 4096 * 1536
    others = 917_107_059_440 - experts
    stages, holders = parallel.pipeline, parallel.expert * parallel.pipeline
    found = others / stages * (6 + 12 * stages / ranks) + experts / holders * (6 + 12 * holders / ranks)
    assert round(found / 1e9) == gigabytes
