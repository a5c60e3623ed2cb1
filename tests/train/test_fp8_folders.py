"""Block-FP8 folders go into the engine as what they stand for: logits, training, expansion while loading, export without FP8."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.logical import StoredWeights
from tests.commands import moexpand
from tests.parents import make_parent
from tests.train.conftest import from_checkpoint, settings
from tests.upcycle.test_fp8_parents import _blocks, dequantised

RULES = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent whose linears are FP8, with scales that are no powers of two, and one of the weights that they stand for."""
    root = tmp_path_factory.mktemp("fp8")
    plain = make_parent(root / "plain", experts=16, top_k=4, hidden=160, intermediate=128, vocab=8448, max_shard_size="1GB")
    fp8 = shutil.copytree(plain, root / "fp8")
    (plain_file,), (fp8_file,) = plain.glob("*.safetensors"), fp8.glob("*.safetensors")
    tensors, rounded, meant = load_file(plain_file), {}, {}
    for name, value in tensors.items():
        rounded[name] = meant[name] = value
        if name.endswith("_proj.weight"):
            rounded[name], rounded[f"{name}_scale_inv"] = _blocks(value, torch.float32)
            meant[name] = dequantised(rounded[name], rounded[f"{name}_scale_inv"]).float()
    save_file(rounded, fp8_file, metadata={"format": "pt"})
    save_file(meant, plain_file, metadata={"format": "pt"})
    index = fp8 / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
    config = json.loads((fp8 / "config.json").read_text())
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": RULES}))
    return fp8, plain


def test_rows_of_any_range_are_those_of_the_whole(folders: tuple[Path, Path]) -> None:
    fp8, plain = folders
    read, meant = StoredWeights(open_checkpoint(fp8)).read_torch, StoredWeights(open_checkpoint(plain)).read_torch
    for name in ("model.layers.0.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"):
        whole = read(name)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole, meant(name), rtol=1e-6, atol=0)
        for rows in (slice(0, 1), slice(100, 128), slice(127, 130), slice(128, 160)):
            if rows.stop <= len(whole):
                assert torch.equal(read(name, rows), whole[rows])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(read(name, slice(30, 150)), read(name)[30:150])
    assert read("model.layers.0.mlp.gate.weight").dtype == meant("model.layers.0.mlp.gate.weight").dtype


def test_logits_are_those_of_transformers_on_what_the_folder_stands_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    fp8, plain = folders
    tokens = np.random.default_rng(0).integers(0, 8448, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    done = moexpand("logits", f"checkpoint={fp8}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        due = Qwen3MoeForCausalLM.from_pretrained(plain, dtype=torch.float32)(torch.from_numpy(tokens)).logits
    assert np.abs(np.load(tmp_path / "out.npy") - due.numpy()).max() < 1e-4


@pytest.mark.layouts
def test_a_child_is_expanded_while_it_is_loaded_trained_and_exported_without_fp8(
    folders: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    losses = {}
    for name, folder in zip(("fp8", "plain"), folders, strict=True):
        plan, run = tmp_path / f"{name}.json", tmp_path / name
        words = ["num_experts=64", "num_groups=4", "router_noise=0", "dry_run=true", f"plan_out={plan}"]
        planned = moexpand("upcycle", f"source={folder}", f"target={tmp_path / 'child'}", *words)
        assert planned.returncode == 0, planned.stderr
        done = moexpand(*settings(shards, run, **from_checkpoint(folder), expand=plan, train__steps=2, save__every=0))
        assert done.returncode == 0, done.stderr
        losses[name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses["fp8"], losses["plain"], rtol=1e-5)
    target = tmp_path / "exported"
    done = moexpand("export", f"run={tmp_path / 'fp8'}", f"target={target}")
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    tensors = load_file(next(target.glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not [name for name in tensors if name.endswith("_scale_inv")]
