"""A grouped child with sigmoid scores, scaled weights and a selection bias keeps all three from folder to folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.base.errors import DONE, WRONG_INPUT, InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.logical import StoredWeights
from tests import closed_form
from tests.commands import moexpand, run_here
from tests.parallel import runs
from tests.parents import make_child, make_parent
from tests.train.conftest import from_checkpoint, settings

EXPERTS, GROUPS, TOP_K, LAYERS, SCALE, RATE = 64, 4, 8, 2, 1.7, 2.0**-10
BIASES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(LAYERS)]
ROUTING = {"scoring_func": "sigmoid", "routed_scaling_factor": SCALE, "router_selection_bias": True}
SHAPE = {"scoring_func": "sigmoid", "routed_scaling_factor": SCALE, "selection_bias": True}
"""In the words of config.json, and in the engine's."""
TOKENS = np.random.default_rng(2).integers(0, 8448, (2, 16))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _model(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def _sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    return said


def _logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child that routes as usual, of a parent with the vocabulary of the shards."""
    shape = {"experts": 16, "hidden": 32, "layers": LAYERS, "intermediate": 8, "vocab": 8448, "heads": 2, "kv_heads": 1}
    parent = make_parent(tmp_path_factory.mktemp("bias") / "parent", top_k=TOP_K, **shape)
    return make_child(parent, parent.with_name("plain"), placement="quarters_spread", num_experts=EXPERTS, num_groups=GROUPS)


@pytest.fixture(scope="module")
def biased(plain: Path) -> Path:
    """The same weights with the other routing and biases of all fp32 digits, written by the safetensors library."""
    folder = Path(shutil.copytree(plain, plain.with_name("biased")))
    random = np.random.default_rng(5)
    biases = {name: torch.from_numpy(0.3 * random.standard_normal(EXPERTS, dtype=np.float32)) for name in BIASES}
    tensors = _tensors(folder) | biases
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "all.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "all.safetensors")}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ROUTING))
    return folder


@pytest.fixture(scope="module")
def run(biased: Path, shards: Path) -> Path:
    """The run folder of two steps on two ranks, with biases that stay."""
    run = biased.with_name("run")
    done = moexpand(*settings(shards, run, **from_checkpoint(biased), parallel__dispatcher="grouped_allgather", train__steps=2))
    assert done.returncode == DONE, done.stderr
    return run


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    target = run.with_name("exported")
    assert run_here("export", f"run={run}", f"target={target}", "format=native") == DONE
    return target


def _pick(bias: np.ndarray) -> closed_form.Pick:
    """The definition: the best scores plus bias of every group, weighed by their share of the scores, times the factor."""

    def pick(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = 1 / (1 + np.exp(-logits))
        ranked_GM = np.argsort(-(scores + bias).reshape(GROUPS, -1), axis=1)
        chosen = (ranked_GM[:, : TOP_K // GROUPS] + np.arange(0, EXPERTS, EXPERTS // GROUPS)[:, None]).ravel()
        return chosen, SCALE * scores[chosen] / scores[chosen].sum()

    return pick


def test_the_exported_config_says_how_it_routes_and_the_bias_is_the_one_that_came(biased: Path, exported: Path) -> None:
    before, after = _tensors(biased), _tensors(exported)
    assert before.keys() == after.keys()
    for name in BIASES:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name])
        assert not torch.equal(after[name].bfloat16().float(), after[name])
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 1e-3 < moved < 5e-3, "everything else has made two steps"
    config = json.loads((exported / "config.json").read_text())
    assert config == json.loads((biased / "config.json").read_text())
    assert config.items() >= (ROUTING | {"model_type": "qwen3_moe_grouped"}).items()


def test_the_exported_model_in_transformers_and_by_definition_is_the_engines(exported: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", TOKENS)
    assert run_here("logits", f"checkpoint={exported}", f"tokens={tmp_path / 'in.npy'}", f"out={tmp_path / 'out.npy'}") == DONE
    model, found = _model(exported), np.load(tmp_path / "out.npy")
    assert np.abs(found - _logits(model)).max() <= 1e-5
    tensors = closed_form.weights_of(exported)
    due = closed_form.logits(exported, TOKENS, [_pick(tensors[name]) for name in BIASES])
    assert np.abs(found - due).max() <= 1e-5
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert np.abs(found - _logits(model)).max() > 0.1, "the bias decides which experts are visited"


def test_a_bias_stays_fp32_in_a_model_that_is_loaded_in_bf16(exported: Path) -> None:
    model, due = _model(exported, dtype=torch.bfloat16), _tensors(exported)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name, layer in zip(BIASES, model.model.layers, strict=True):
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, due[name])


def test_an_export_that_is_taken_up_again_has_the_same_bits(biased: Path, exported: Path) -> None:
    """In an engine that held other weights before."""
    from moexpand.train import weights

    due = _tensors(exported)
    with runs.engine(biased, {}, {}, shape=SHAPE) as built:
        weights.load(built, StoredWeights(open_checkpoint(exported)))
        found = {name: tensor.clone() for name, tensor in built.tensors()}
    assert found.keys() == due.keys()
    assert all(found[name].dtype == due[name].dtype and torch.equal(found[name], due[name]) for name in due)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_bias_moves_against_the_load_of_its_group_in_fp32(biased: Path, tmp_path: Path, precision: str, dtype: Any) -> None:
    """Bit for bit from the loads that two steps report, through a checkpoint and into a folder."""
    from moexpand.parallel import checkpoint
    from moexpand.train import weights

    first = _tensors(biased)
    due = {name: first[name].numpy().reshape(GROUPS, -1) for name in BIASES}
    (tmp_path / "states").mkdir()
    with runs.engine(biased, {}, {"bias_rate": RATE}, precision, SHAPE) as built:
        runs.prepare(built)
        for step in range(2):
            report = built.step(runs.device_batches(built, step), 1e-3)
            for name, counts in zip(BIASES, report.dispatched.numpy(), strict=True):
                loads = counts.reshape(GROUPS, -1)
                due[name] = due[name] + np.float32(RATE) * np.sign(loads.mean(1, keepdims=True) - loads).astype(np.float32)
        checkpoint.save(built, tmp_path / "states", {})
    with runs.engine(biased, {}, {"bias_rate": RATE}, precision, SHAPE) as built:
        checkpoint.load(built, tmp_path / "states")
        stored = open_checkpoint(biased)
        weights.write(built, stored.architecture, stored.config, tmp_path / "out", None, "5GB", dtype)
    found = _tensors(tmp_path / "out")
    assert found["lm_head.weight"].dtype == dtype
    for name in BIASES:
        assert found[name].numpy().dtype == due[name].dtype == np.float32
        assert np.array_equal(found[name].numpy(), due[name].ravel())
        assert float((found[name] - first[name]).abs().max()) > 1.9 * RATE, "two steps the same way, somewhere"


def test_a_parent_that_takes_up_a_bias_computes_the_same_under_the_type_that_carries_it(plain: Path, shards: Path) -> None:
    """As `train` starts it with balance.selection_bias=true and `export` describes it."""
    from moexpand.conf.compose import compose
    from moexpand.train import export, preflight, weights

    parent, target = plain.with_name("parent"), plain.with_name("taken_up")
    words = [f"checkpoint={parent}", f"data.shards={shards}", f"run.dir={target}", "balance.selection_bias=true"]
    source = preflight.source_of(compose("train", words))
    with runs.engine(parent, {}, {}, shape={"selection_bias": True}) as built:
        described = export.describe(source, "float32", "native")
        weights.write(built, source.architecture, described, target, None, "5GB", torch.float32)
    assert (described["model_type"], described["router_selection_bias"]) == ("qwen3_moe_grouped", True)
    assert not any(_tensors(target)[name].any() for name in BIASES)
    assert np.abs(_logits(_model(target)) - _logits(_model(parent))).max() <= 1e-5


def test_a_bias_that_would_stay_0_is_refused_and_one_that_is_there_may_stay(
    plain: Path, biased: Path, run: Path, shards: Path, tmp_path: Path
) -> None:
    """From the checkpoint, or from a run that goes on."""
    from moexpand.conf.compose import compose
    from moexpand.train import preflight

    def check(checkpoint: Path, folder: Path) -> None:
        words = [f"checkpoint={checkpoint}", f"data.shards={shards}", f"run.dir={folder}", "balance.selection_bias=true"]
        preflight.check(compose("train", [*words, "train.seq_length=64"]), 1)

    check(biased, tmp_path)
    check(plain, run)
    with pytest.raises(InputError, match=r"balance\.bias_rate=0 leaves it there"):
        check(plain, tmp_path)


def test_a_run_that_goes_on_with_a_bias_or_without_one_is_refused_by_the_key(run: Path) -> None:
    from moexpand.train import checkpoints

    folder = checkpoints.find(run)
    saved = checkpoints.read_progress(folder)
    fixed = saved.fixed | {"the model's selection_bias": False}
    assert not checkpoints.compare(saved, saved.fixed, saved.noted, folder)
    with pytest.raises(InputError, match=r"from: balance\.selection_bias was True and is False; set them back"):
        checkpoints.compare(saved, fixed, saved.noted, folder)


def test_lmdeploys_format_cannot_carry_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_here("export", f"run={run}", f"target={tmp_path / 'target'}", "format=lmdeploy") == WRONG_INPUT
    assert "format=lmdeploy cannot carry this run's selection bias, scoring_func or routed_scaling_factor" in _sentence(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", list(ROUTING))
def test_parents_that_route_like_this_are_refused(plain: Path, exported: Path, tmp_path: Path, capsys: Any, key: str) -> None:
    """Under the type that honours the key, and under the one whose code would pass it over."""
    for type_, says in (("qwen3_moe_grouped", "only parents with plain softmax routing"), ("qwen3_moe", f"has {key}=")):
        parent = Path(shutil.copytree(exported if key == "router_selection_bias" else plain, tmp_path / type_))
        config = json.loads((parent / "config.json").read_text())
        kept = {name: value for name, value in config.items() if name not in ROUTING}
        (parent / "config.json").write_text(json.dumps(kept | {key: ROUTING[key], "model_type": type_}))
        words = [f"source={parent}", f"target={tmp_path / 'child'}", "num_experts=128", "num_groups=4", "placement=block"]
        assert run_here("upcycle", *words) == WRONG_INPUT
        assert says in _sentence(capsys)
        assert not (tmp_path / "child").exists()
