"""Training on pictures through the commands: from scratch, from checkpoints, to children, resumed, exported, refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from moexpand.train.reference import compare
from tests.commands import moexpand
from tests.parents import make_child, make_parent
from tests.train.conftest import from_checkpoint, settings
from tests.train.pictures import IMAGE_PAD, fresh_model, picture_shards

TEXT = {name: None for name in fresh_model() if name.startswith(("model.vision.", "data."))}
"""Changes of a fresh model's words that leave out what a text model has no use for."""


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_shards(tmp_path_factory.mktemp("pictured"))


def words(shards: Path, run: Path, **changes: Any) -> list[str]:
    return settings(shards, run, **{"train.steps": 4, "save.every": 2, "evaluate.every": 4, "data.held_out": 0.2, **changes})


def ran(shards: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run that went well."""
    done = moexpand(*words(shards, run, **changes))
    assert done.returncode == 0, done.stderr
    return rows_of(run)


def tensors(folder: Path) -> dict[str, Any]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def parent(pictured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that learnt for a few steps on two ranks, exported."""
    folder = tmp_path_factory.mktemp("vl")
    ran(pictured, folder / "run", **fresh_model(), **{"model.num_experts": 16, "model.num_experts_per_tok": 4})
    done = moexpand("export", f"run={folder / 'run'}", f"target={folder / 'parent'}")
    assert done.returncode == 0, done.stderr
    return folder / "parent"


@pytest.fixture(scope="module")
def child(parent: Path) -> Path:
    return make_child(parent, parent.with_name("child"), num_experts=64, num_groups=4, placement="halves_tile")


@pytest.fixture(scope="module")
def straight(pictured: Path, parent: Path) -> Path:
    """The run of four steps from the parent on two ranks, which several tests compare with."""
    run = parent.with_name("straight")
    ran(pictured, run, **from_checkpoint(parent))
    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_exported_parent_is_an_ordinary_folder_of_its_family(parent: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor

    assert json.loads((parent / "config.json").read_text())["model_type"] == "qwen3_vl_moe"
    assert AutoConfig.from_pretrained(parent).image_token_id == IMAGE_PAD
    processor = AutoImageProcessor.from_pretrained(parent)
    assert (processor.patch_size, processor.merge_size) == (4, 2)
    stack = tensors(parent)["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert stack.shape == (16, 32, 16), "[experts, in, 2 x out], as on the hub"


def test_the_loss_on_pictures_is_that_of_transformers(pictured: Path, straight: Path, child: Path, tmp_path: Path) -> None:
    """At step 0, by the parent's own class and by the child's own model code, each segment alone."""
    assert "difference" in compare(straight)
    ran(pictured, tmp_path / "child", **from_checkpoint(child), **{"parallel.dispatcher": "grouped_allgather", "train.steps": 1})
    assert "difference" in compare(tmp_path / "child")


@pytest.mark.layouts
def test_a_run_on_pictures_goes_on_bitwise(pictured: Path, parent: Path, straight: Path, tmp_path: Path) -> None:
    ran(pictured, tmp_path / "stopped", **from_checkpoint(parent), **{"train.steps": 2})
    resumed = ran(pictured, tmp_path / "stopped", **from_checkpoint(parent))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows_of(straight)]
    assert [row["grad_norm"] for row in resumed] == [row["grad_norm"] for row in rows_of(straight)]


@pytest.mark.layouts
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel.expert": 1, "launch.processes": 1},
        {"parallel.expert": 1, "parallel.tensor": 2},
        {"parallel.expert": 1, "parallel.pipeline": 2},
        {"parallel.expert": 1, "parallel.context": 2},
    ],
    ids=["one rank", "TP2", "PP2", "CP2"],
)
def test_every_layout_follows_the_same_curve(
    pictured: Path, parent: Path, straight: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """That of EP2."""
    found = ran(pictured, tmp_path / "run", **from_checkpoint(parent), **{"evaluate.every": 0, "save.every": 0}, **layout)
    for row, due in zip(found, rows_of(straight), strict=True):
        assert row["loss"] == pytest.approx(due["loss"], rel=2e-5), layout
        assert row["grad_norm"] == pytest.approx(due["grad_norm"], rel=1e-3), layout


@pytest.mark.parametrize("made", ["parent", "child"])
def test_import_and_export_give_every_bit_back(pictured: Path, made: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(made)
    ran(pictured, tmp_path / "run", **from_checkpoint(folder), **{"train.steps": 1, "optim.lr": 0.0, "evaluate.every": 0})
    done = moexpand("export", f"run={tmp_path / 'run'}", f"target={tmp_path / 'back'}")
    assert done.returncode == 0, done.stderr
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(np.array_equal(value.numpy(), after[name].numpy()) for name, value in before.items())
    kept = {"config.json", "preprocessor_config.json"}
    assert all(json.loads((folder / name).read_text()) == json.loads((tmp_path / "back" / name).read_text()) for name in kept)


@pytest.mark.layouts
def test_a_frozen_tower_stays_and_a_warm_up_moves_nothing_else(pictured: Path, parent: Path, tmp_path: Path) -> None:
    before = tensors(parent)
    for name, changes, stays in (
        ("frozen", {"vision.freeze": "[tower]"}, lambda name: name.startswith("model.visual.") and "merger" not in name),
        ("warm-up", {"vision.warmup_steps": 4}, lambda name: not name.startswith("model.visual.")),
    ):
        run = tmp_path / name
        rows = ran(pictured, run, **from_checkpoint(parent), **changes)
        assert {"tower_lr", "projector_lr"} <= rows[0].keys()
        assert moexpand("export", f"run={run}", f"target={run}-out").returncode == 0
        after = tensors(Path(f"{run}-out"))
        for tensor, value in before.items():
            same = np.array_equal(value.numpy(), after[tensor].numpy())
            assert same == stays(tensor), (name, tensor)


@pytest.mark.layouts
def test_pictures_can_be_left_out(pictured: Path, parent: Path, straight: Path, tmp_path: Path) -> None:
    unseen = ran(pictured, tmp_path / "unseen", **from_checkpoint(parent), **{"data.images": "off"})
    assert [row["tokens"] for row in rows_of(straight)] != [row["tokens"] for row in unseen]


@pytest.mark.layouts
def test_a_fresh_intern_s1_pro_trains_and_comes_back_with_its_tables(pictured: Path, tmp_path: Path) -> None:
    made = fresh_model(
        "interns1_pro", **{"model.num_experts": 32, "model.router_n_groups": 8, "model.max_position_embeddings": 64}
    )
    rows = ran(pictured, tmp_path / "run", **made)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert moexpand("export", f"run={tmp_path / 'run'}", f"target={tmp_path / 'out'}").returncode == 0
    found, config = tensors(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    tables = [found[f"model.language_model.rotary_emb.{name}_coef"] for name in ("sin", "cos")]
    kept = sum(1e6 ** (-2 * pair / 16) > 2 * np.pi / 64 for pair in range(8))
    assert all(table.shape == (2, kept, kept) for table in tables)
    assert config["model_type"] == "interns1_pro"
    assert "deepstack_visual_indexes" not in config["vision_config"]
    again = ran(pictured, tmp_path / "again", **from_checkpoint(tmp_path / "out"))
    assert again[0]["loss"] < rows[0]["loss"], "the exported weights were read"
    assert "difference" in compare(tmp_path / "again"), "of pictures too, by the model code that was exported"
    refused = moexpand("export", f"run={tmp_path / 'run'}", f"target={tmp_path / 'text'}", "format=qwen3_moe")
    assert (refused.returncode, "moexpand convert family=qwen3_moe" in refused.stderr) == (2, True)
    assert moexpand("export", f"run={tmp_path / 'run'}", f"target={tmp_path / 'same'}", "format=interns1_pro").returncode == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.vision.image_token_id": 7}, "writes pictures with token 8204 and the model has image_token_id=7"),
        ({"model.vision.num_position_embeddings": 50}, "num_position_embeddings=50 is no square number"),
        ({"model.vision.hidden_size": 30}, "model.vision.hidden_size=30 is not a multiple of 4 x model.vision.num_heads=2"),
        ({"model.vision.deepstack_visual_indexes": "[5]"}, "must name different blocks of 0 to 1"),
        ({"model.mrope_section": "[1,2,3]"}, "must be three numbers that add up to model.head_dim / 2 = 8"),
        ({"vision.freeze": "[tower,hands]"}, "vision.freeze names hands; the parts are tower, projector, decoder"),
        ({"vision.freeze": "[tower,projector,decoder]"}, "leaves nothing that learns"),
        ({"vision.freeze": "[tower]", "vision.tower_lr": 0.5}, "vision.tower_lr has no effect"),
        (
            {"vision.freeze": "[decoder]", "parallel.pipeline": 2, "parallel.expert": 1},
            "leaves nothing that learns on the later stages of parallel.pipeline=2",
        ),
        ({"model.norm_topk_prob": "false"}, "model.family=qwen3_vl_moe always normalises"),
        ({"model.vision.image_token_id": 9000}, "image_token_id=9000 is outside the vocabulary of 8,448 tokens"),
        ({"data.images": "off"}, "data.min_pixels=256 is for pictures and data.images=off leaves them out"),
        ({"vision.warmup_steps": 9}, "vision.warmup_steps=9 is more than train.steps=4"),
        (
            {"model.family": "qwen3_moe", **TEXT, "vision.tower_lr": 0.5},
            "vision.tower_lr=0.5 is for a model with a vision tower and this one has none",
        ),
        ({"balance.selection_bias": "true", "balance.bias_rate": 1e-3}, "cannot be written with a selection bias"),
        (
            {
                "model.vision.deepstack_visual_indexes": "[0,1]", "parallel.pipeline": 2, "parallel.expert": 1,
            },
            "DeepStack adds features to the first 2 layers, and with parallel.pipeline=2",
        ),
        ({"model.vision.deepstack_visual_indexes": "[a]"}, "takes a list, such as model.vision.deepstack_visual_indexes=[1,2]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(
    pictured: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    done = moexpand(*words(pictured, tmp_path / "run", **{**fresh_model(), **changes}))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_picture_processor_of_another_patch_size_is_refused(pictured: Path, parent: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(parent, tmp_path / "broken")
    fields = json.loads((broken / "preprocessor_config.json").read_text())
    (broken / "preprocessor_config.json").write_text(json.dumps(fields | {"patch_size": 16}))
    done = moexpand(*words(pictured, tmp_path / "run", **from_checkpoint(broken)))
    assert (done.returncode, "has patch_size 16 for its pictures and 4 for its vision tower" in done.stderr) == (2, True)


def test_logits_refuse_a_place_for_a_picture(parent: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.array([[1, 2, 3], [4, IMAGE_PAD, 5]]))
    done = moexpand("logits", f"checkpoint={parent}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}")
    assert (done.returncode, "image_token_id=8204 in sequence 1" in done.stderr) == (2, True)
    assert not (tmp_path / "out.npy").exists()


def test_a_text_model_reads_the_same_shards_without_their_pictures(pictured: Path, tmp_path: Path) -> None:
    text = make_parent(tmp_path / "text", experts=8, top_k=2, vocab=8448)
    rows = ran(pictured, tmp_path / "run", **from_checkpoint(text), **{"evaluate.every": 0})
    assert rows[-1]["loss"] > 0


@pytest.mark.layouts
def test_a_run_with_a_frozen_decoder_is_saved_gone_on_from_and_exported(pictured: Path, parent: Path, tmp_path: Path) -> None:
    made = {**from_checkpoint(parent), "vision.freeze": "[decoder]", "evaluate.every": 0}
    straight = ran(pictured, tmp_path / "straight", **made)
    ran(pictured, tmp_path / "run", **made, **{"train.steps": 2})
    thawed = moexpand(*words(pictured, tmp_path / "run", **{**made, "vision.freeze": "[]"}))
    assert (thawed.returncode, "vision.freeze was ['decoder'] and is []" in thawed.stderr) == (2, True), thawed.stderr
    resumed = ran(pictured, tmp_path / "run", **made)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]
    assert moexpand("export", f"run={tmp_path / 'run'}", f"target={tmp_path / 'out'}").returncode == 0
    before, after = tensors(parent), tensors(tmp_path / "out")
    for name, value in before.items():
        assert np.array_equal(value.numpy(), after[name].numpy()) == (not name.startswith("model.visual.")), name
