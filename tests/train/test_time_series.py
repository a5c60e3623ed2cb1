"""Training on time series through the commands: from scratch, exported, imported, expanded, converted, frozen, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from moexpand.base.errors import InputError
from moexpand.train.reference import compare
from tests.commands import moexpand, sentence
from tests.train.conftest import from_checkpoint, settings
from tests.train.pictures import TOWER

TS_CONTEXT = 8234
"""<TS_CONTEXT> of qwen-8192-science."""
ENCODER = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_source_positions": 20,
    "num_mel_bins": 8, "ts_adapt_in_dim": 16, "ts_hidden_dim": 16, "patch_heads": 2, "patch_ffn_dim": 16,
    "ts_token_id": TS_CONTEXT,
}  # fmt: skip


ONE_RANK = {"launch.processes": 1, "parallel.expert": 1}


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of waves and walks with a sentence each, of several lengths, rates and channels, and some plain texts."""
    folder, drawn = tmp_path_factory.mktemp("heard"), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(60):
        points, channels = int(drawn.integers(1, 300)), int(drawn.integers(1, 4))
        wave = np.sin(np.arange(points) / 5) if number % 2 else np.cumsum(drawn.normal(size=points))
        np.save(folder / f"{number}.npy", (wave[:, None] + 0.1 * drawn.normal(size=(points, channels))).astype(np.float32))
        text = f"Series {number} is a {'wave' if number % 2 else 'walk'} of {points} points."
        rows.append({"series": f"{number}.npy", "sampling_rate": float(drawn.choice([1, 50, 1000])), "text": text})
    rows += [{"text": " ".join(drawn.choice(["expert", "router", "token", "layer"], 60))} for _ in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = moexpand(
        "data", "build", f"sources=[{folder / 'rows.jsonl'}]", f"out={folder / 'shards'}", "tokenizer=qwen-8192-science",
        "workers=1", "filters.min_characters=1", "filters.text_similarity=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def fresh_model(**changes: Any) -> dict[str, Any]:
    tower = {key: value for key, value in TOWER.items() if "deepstack" not in key}
    return {
        "model.family": "interns1_pro", "model.vocab_size": 11_392, "model.num_experts": 16, "model.num_experts_per_tok": 4,
        **{f"model.vision.{key}": value for key, value in tower.items()}, "model.time_series.use": "true",
        **{f"model.time_series.{key}": value for key, value in ENCODER.items()}, **changes,
    }  # fmt: skip


def words(shards: Path, run: Path, **changes: Any) -> list[str]:
    return settings(shards, run, **{"train.steps": 3, "save.every": 0, "data.held_out": 0.2, **ONE_RANK, **changes})


def ran(shards: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    done = moexpand(*words(shards, run, **changes))
    assert done.returncode == 0, done.stderr
    return rows_of(run)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exported(run: Path, target: Path) -> Path:
    done = moexpand("export", f"run={run}", f"target={target}")
    assert done.returncode == 0, done.stderr
    return target


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def parent(heard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent that learnt for a few steps on two ranks, exported."""
    folder = tmp_path_factory.mktemp("series")
    rows = ran(heard, folder / "run", **fresh_model(), **{"time_series.lr": 0.5, "launch.processes": 2, "parallel.expert": 2})
    assert [row["time_series_lr"] / row["lr"] for row in rows] == [0.5] * 3
    return exported(folder / "run", folder / "parent")


@pytest.fixture(scope="module")
def still(heard: Path, parent: Path) -> Path:
    """A step from the parent that moves nothing, evaluated."""
    run = parent.with_name("still")
    ran(heard, run, **from_checkpoint(parent), **{"train.steps": 1, "optim.lr": 0.0, "evaluate.every": 1})
    return run


@pytest.fixture(scope="module")
def deaf(heard: Path, parent: Path) -> Path:
    """The same on the text of the samples alone."""
    run = parent.with_name("deaf")
    ran(heard, run, **from_checkpoint(parent), **{"train.steps": 1, "optim.lr": 0.0, "data.time_series": "off"})
    return run


def test_an_exported_parent_says_its_encoder(parent: Path) -> None:
    config = json.loads((parent / "config.json").read_text())
    assert config["ts_token_id"] == TS_CONTEXT
    due = {key: value for key, value in ENCODER.items() if key != "ts_token_id"}
    assert config["ts_config"].items() >= (due | {"out_hidden_size": 32}).items()
    names = {name.removeprefix("model.time_series.") for name in tensors(parent) if ".time_series." in name}
    assert {"encoder_embed.conv.weight", "encoder.layers.0.self_attn.k_proj.weight", "projector.linear_2.bias"} <= names
    assert "encoder.layers.0.self_attn.k_proj.bias" not in names


def test_import_and_export_give_every_bit_back(parent: Path, still: Path, tmp_path: Path) -> None:
    before, after = tensors(parent), tensors(exported(still, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert (parent / "config.json").read_text() == (tmp_path / "back" / "config.json").read_text()


def test_a_child_keeps_the_encoder_and_hears_as_its_parent(heard: Path, parent: Path, tmp_path: Path) -> None:
    """Step 0 on series: the child's loss is its parent's, as every parent's expert has its copies in the groups."""
    child = tmp_path / "child"
    done = moexpand(
        "upcycle", f"source={parent}", f"target={child}", "num_experts=64", "num_groups=4", "placement=halves_tile", "workers=1"
    )
    assert done.returncode == 0, done.stderr
    assert moexpand("verify", f"source={parent}", f"target={child}").returncode == 0
    before, after = tensors(parent), tensors(child)
    assert all(np.array_equal(value, after[name]) for name, value in before.items() if ".time_series." in name)
    counted = json.loads(moexpand("count", f"model={child}", "format=json").stdout)
    own = sum(value.size for name, value in before.items() if ".time_series." in name)
    assert counted["subtotals"]["time_series"] == own
    rows = ran(
        heard, tmp_path / "run", **from_checkpoint(child), **{"train.steps": 1, "parallel.dispatcher": "grouped_allgather"}
    )
    assert np.isfinite(rows[0]["loss"])


@pytest.mark.layouts
def test_a_frozen_encoder_stays_and_one_learns_alone(heard: Path, parent: Path, tmp_path: Path) -> None:
    before = tensors(parent)
    own = [name for name in before if ".time_series." in name]
    alone = {"vision.freeze": "[decoder,tower,projector]"}
    for name, stays, changes in (("frozen", True, {"time_series.freeze": "true"}), ("alone", False, alone)):
        ran(heard, tmp_path / name, **from_checkpoint(parent), **{"train.steps": 1}, **changes)
        after = tensors(exported(tmp_path / name, tmp_path / f"{name}-out"))
        assert all(np.array_equal(before[each], after[each]) for each in own) == stays, name
        assert np.array_equal(before["lm_head.weight"], after["lm_head.weight"]) != stays


def test_series_that_are_turned_off_leave_their_text(still: Path, deaf: Path) -> None:
    (with_series,), (without,) = rows_of(still), rows_of(deaf)
    assert with_series["loss"] != without["loss"]


def test_conversions_drop_the_encoder_or_give_a_fresh_one(parent: Path, tmp_path: Path) -> None:
    done = moexpand("convert", f"source={parent}", f"target={tmp_path / 'none'}", "encoder=none")
    assert done.returncode == 0, done.stderr
    without = tensors(tmp_path / "none")
    assert without.keys() == {name for name in tensors(parent) if ".time_series." not in name}
    assert not {"ts_config", "ts_token_id"} & json.loads((tmp_path / "none" / "config.json").read_text()).keys()
    sizes = [f"time_series.{key}={value}" for key, value in (ENCODER | {"encoder_layers": 2}).items()]
    done = moexpand("convert", f"source={tmp_path / 'none'}", f"target={tmp_path / 'fresh'}", "encoder=fresh", *sizes)
    assert done.returncode == 0, done.stderr
    fresh = tensors(tmp_path / "fresh")
    assert "model.time_series.encoder.layers.1.fc1.weight" in fresh
    assert not any(name.endswith(".pe") for name in fresh)
    assert np.array_equal(fresh["model.time_series.encoder.layer_norm.weight"], np.ones(32, np.float32))
    layer = "model.time_series.encoder_embed.transformer_encoder.layers.0"
    assert not fresh[f"{layer}.self_attn.in_proj_bias"].any()
    assert all(np.array_equal(value, fresh[name]) for name, value in without.items())


def test_a_conversion_of_another_part_keeps_the_encoder_and_its_token(parent: Path, tmp_path: Path) -> None:
    tower = [f"vision.{key}={value}" for key, value in TOWER.items() if "deepstack" not in key]
    done = moexpand("convert", f"source={parent}", f"target={tmp_path / 'tower'}", "tower=fresh", *tower)
    assert done.returncode == 0, done.stderr
    before, after = tensors(parent), tensors(tmp_path / "tower")
    assert all(np.array_equal(value, after[name]) for name, value in before.items() if ".visual." not in name)
    sizes = [f"time_series.{key}={value}" for key, value in ENCODER.items() if key != "ts_token_id"]
    done = moexpand("convert", f"source={parent}", f"target={tmp_path / 'fresh'}", "encoder=fresh", *sizes)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "fresh" / "config.json").read_text())["ts_token_id"] == TS_CONTEXT


def test_a_config_gives_an_engine_the_sizes_that_it_reads(parent: Path, tmp_path: Path) -> None:
    """LMDeploy takes them as attributes of `ts_config`; a folder without an encoder has no such attribute."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(parent, trust_remote_code=True)
    read = config.ts_config
    assert (read.d_model, read.ts_adapt_in_dim, read.ts_adapt_out_dim, read.ts_hidden_dim) == (32, 16, 16, 16)
    assert (read.activation_function, read.scale_embedding, read.pad_token_id) == ("gelu", False, None)
    assert (read.encoder_layers, read.encoder_attention_heads, read.encoder_ffn_dim) == (1, 4, 48)
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.ts_config.to_dict() == read.to_dict()
    done = moexpand("convert", f"source={parent}", f"target={tmp_path / 'none'}", "encoder=none")
    assert done.returncode == 0, done.stderr
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "none", trust_remote_code=True), "ts_config")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_function": "relu"}, "has activation_function='relu' in ts_config; gelu alone is computed"),
    ],
)
def test_an_encoder_that_is_not_computed_is_refused(
    heard: Path, parent: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    shutil.copytree(parent, tmp_path / "other")
    config = json.loads((parent / "config.json").read_text())
    config["ts_config"] |= changes
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    done = moexpand(*words(heard, tmp_path / "run", **from_checkpoint(tmp_path / "other")))
    assert says in sentence(done, 2)


def test_without_series_the_token_of_their_places_is_one_of_text(heard: Path, parent: Path, deaf: Path, tmp_path: Path) -> None:
    """A tokenizer may use the id for a word, where series are turned off or the shards have none."""
    shutil.copytree(parent, tmp_path / "other")
    config = json.loads((parent / "config.json").read_text()) | {"ts_token_id": 220}  # the space, in qwen's ranks
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (row,) = ran(heard, tmp_path / "run", **from_checkpoint(tmp_path / "other"), **{"train.steps": 1, "data.time_series": "off"})
    assert row["loss"] == rows_of(deaf)[0]["loss"]


def test_the_second_opinion_says_that_it_hears_nothing(still: Path) -> None:
    with pytest.raises(InputError, match="trains on time series, which transformers does not compute"):
        compare(still)


def test_transformers_computes_text_and_refuses_places_of_series(parent: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(parent, trust_remote_code=True).eval()
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 11_392)
        with pytest.raises(ValueError, match=f"The tokens hold {TS_CONTEXT}, a place for a time series"):
            model(input_ids=torch.tensor([[5, TS_CONTEXT, 7]]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.time_series.ts_token_id": 8233}, "writes time series with token 8234 and the model has ts_token_id=8233"),
        ({"model.time_series.ts_token_id": 20_000}, "model.time_series.ts_token_id=20000 is outside the vocabulary of 11,392"),
        ({"model.time_series.use": "false"}, "is the size of an encoder of time series; give model.time_series.use=true"),
        ({"model.time_series.encoder_attention_heads": 5}, "d_model=32 is not a multiple of its 5 attention heads"),
        ({"time_series.freeze": "true", "time_series.lr": 2.0}, "time_series.lr=2.0 has no effect with time_series.freeze=true"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    heard: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    done = moexpand(*words(heard, tmp_path / "run", **fresh_model(**changes)))
    assert says in sentence(done, 2)
    assert not (tmp_path / "run").exists()


def test_keys_of_an_encoder_are_refused_without_one(heard: Path, parent: Path, tmp_path: Path) -> None:
    moexpand("convert", f"source={parent}", f"target={tmp_path / 'none'}", "encoder=none")
    for changes, says in (
        ({"time_series.lr": 0.5}, "time_series.lr=0.5 is for a model with an encoder of time series and this one has none"),
        ({"data.time_series": "off"}, "data.time_series=off is for a model with an encoder of time series"),
    ):
        done = moexpand(*words(heard, tmp_path / "run", **from_checkpoint(tmp_path / "none"), **changes))
        assert says in sentence(done, 2)


def test_a_place_for_a_series_is_refused_by_logits(parent: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.array([[1, 2], [3, TS_CONTEXT]]))
    done = moexpand("logits", f"checkpoint={parent}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}")
    assert "holds ts_token_id=8234 in sequence 1, a place for a time series" in sentence(done, 2)
