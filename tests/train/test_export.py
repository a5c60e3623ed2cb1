"""An exported run is an ordinary Hugging Face folder, and transformers computes with it what training did."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.closed_form import weights_of
from tests.commands import moexpand, run_here
from tests.train.conftest import STEPS, from_checkpoint, settings

TOKENS = np.random.default_rng(2).integers(0, 8448, (2, 16))


@pytest.fixture(scope="module")
def child_run(child: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the child on two ranks, by whole groups."""
    run = tmp_path_factory.mktemp("child") / "run"
    changes = {**from_checkpoint(child), "parallel.dispatcher": "grouped_allgather", "train.steps": 3, "save.every": 0}
    done = moexpand(*settings(shards, run, **changes, evaluate__every=3))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def exported_child(child_run: Path) -> Path:
    target = child_run.with_name("exported")
    assert run_here("export", f"run={child_run}", f"target={target}") == 0
    return target


def _rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _engine_logits(folder: Path, scratch: Path) -> np.ndarray:
    np.save(scratch / "tokens.npy", TOKENS)
    assert run_here("logits", f"checkpoint={folder}", f"tokens={scratch / 'tokens.npy'}", f"out={scratch / 'out.npy'}") == 0
    return np.load(scratch / "out.npy")


def _loss(model: Any, batches: list[Any]) -> float:
    """Loss per unmasked token of the loader's micro-batches, one segment at a time."""
    total, tokens = 0.0, 0
    for batch in batches:
        for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.tokens[start:stop])[None]).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels[start:stop]), reduction="none")
            total += float((losses * torch.from_numpy(batch.loss_mask[start:stop])).sum())
        tokens += int(batch.loss_mask.sum())
    return total / tokens


def _data(shards: Path) -> Any:
    from moexpand.data.loader import PackedData

    return PackedData(shards, 64, 4, 0, held_out=0.05)


def test_transformers_loads_the_parent_without_a_word(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, info = _load(exported, output_loading_info=True)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not any(info.values()), info
    assert not [record for record in caplog.records if "transformers" in record.name]


def test_the_parents_logits_in_transformers_are_the_engines(exported: Path, tmp_path: Path) -> None:
    found = _engine_logits(exported, tmp_path)
    with torch.no_grad():
        due = _load(exported)(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(found - due).max() <= 1e-5
    assert due.std() > 0.05, "the logits are not flat"


def test_the_exported_weights_are_those_of_the_last_step(straight: Path, exported: Path, shards: Path) -> None:
    """transformers' loss on the held-out packs is the one that training wrote down at its end."""
    rows = _rows(straight, "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, STEPS]
    due = _loss(_load(exported), _data(shards).held_out(8, 1))
    assert rows[-1]["held_out_loss"] == pytest.approx(due, rel=1e-5)
    assert rows[0]["held_out_loss"] > due + 0.1


def test_an_earlier_step_can_be_exported(straight: Path, exported: Path, tmp_path: Path) -> None:
    assert run_here("export", f"run={straight}", f"target={tmp_path / 'early'}", "step=5") == 0
    early, late = weights_of(tmp_path / "early"), weights_of(exported)
    assert early.keys() == late.keys()
    moved = np.abs(early["lm_head.weight"] - late["lm_head.weight"]).max()
    assert 1e-4 < moved < (STEPS - 5) * 1.5e-3, "seven steps of at most about the learning rate"


def test_the_tokenizer_of_the_shards_is_in_the_folder(exported: Path, shards: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, own = AutoTokenizer.from_pretrained(exported), _data(shards).tokenizer
    text = "the router sends 随机 α naïve tokens"
    assert tokenizer.encode(text) == own.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_childs_first_loss_is_an_independent_evaluation(child: Path, child_run: Path, shards: Path) -> None:
    model = _load(child, trust_remote_code=True)
    assert _rows(child_run)[0]["loss"] == pytest.approx(_loss(model, _data(shards).batch(0)), rel=1e-5)
    held_out = _rows(child_run, "evaluations.jsonl")[0]["held_out_loss"]
    assert held_out == pytest.approx(_loss(model, _data(shards).held_out(8, 1)), rel=1e-5)


def test_an_exported_child_cannot_run_as_plain_top_k_in_silence(exported_child: Path, child_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="custom code"):
        _load(exported_child, trust_remote_code=False)
    model, info = _load(exported_child, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        due = model(torch.from_numpy(TOKENS)).logits.numpy()
    assert np.abs(_engine_logits(exported_child, tmp_path) - due).max() <= 1e-5


def test_the_exported_child_is_the_trained_one(exported_child: Path, child_run: Path, shards: Path) -> None:
    due = _loss(_load(exported_child, trust_remote_code=True), _data(shards).held_out(8, 1))
    assert _rows(child_run, "evaluations.jsonl")[-1]["held_out_loss"] == pytest.approx(due, rel=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported_child / name).is_file()


def test_for_lmdeploy_the_groups_are_named_and_the_danger_said(
    child_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "lmdeploy"
    assert run_here("export", f"run={child_run}", f"target={target}", "format=lmdeploy") == 0
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (config["router_n_groups"], config["num_experts"]) == (8, 512)
    assert "auto_map" not in config
    assert not list(target.glob("*.py"))
    said = capsys.readouterr().out
    assert "WARNING" in said
    assert "vLLM" in said
    assert "transformers" in said


def test_lmdeploys_format_is_refused_for_a_model_without_groups(straight: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_here("export", f"run={straight}", f"target={tmp_path / 'target'}", "format=lmdeploy") == 2
    assert "one group" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_leaves_nothing(straight: Path, exported: Path, tmp_path: Path, capsys: Any) -> None:
    cases = [
        ([f"run={straight}", f"target={exported}"], "exists already"),
        ([f"run={straight}", f"target={tmp_path / 'new'}", "step=7"], "there are 5, 10, 12"),
        ([f"run={tmp_path / 'nothing'}", f"target={tmp_path / 'new'}"], "nothing"),
    ]
    for words, part in cases:
        assert run_here("export", *words) == 2
        err = capsys.readouterr().err.strip()
        assert part in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
