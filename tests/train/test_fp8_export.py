"""`export quantization=fp8`: the released format, by rules that give the released numbers; what comes back is what was meant."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moexpand.upcycle.fp8_rules import quantised, quantization_config
from moexpand.upcycle.logical import model_tensors
from moexpand.upcycle.models import find_model
from tests.commands import moexpand
from tests.upcycle.test_fp8_parents import dequantised


def test_the_released_models_exclusions_and_linears_are_derived() -> None:
    """623 modules are left out of FP8 and 144,760 linears with 915,088,080,896 weights are in it."""
    model = find_model("Intern-S1-Pro")
    shapes = model_tensors(model.architecture, model.config)
    rounded = [name for name in shapes if quantised(name)]
    assert len(rounded) == 94 * (4 + 512 * 3) == 144_760
    assert sum(math.prod(shapes[name]) for name in rounded) == 915_088_080_896
    kept = quantization_config(shapes)["modules_to_not_convert"]
    assert len(kept) == len(set(kept)) == 623
    layer = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate"}
    prefix = "model.language_model.layers.93."
    assert {name.removeprefix(prefix) for name in kept if name.startswith(prefix)} == layer
    block = {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    prefix = "model.visual.blocks.23."
    assert {name.removeprefix(prefix) for name in kept if name.startswith(prefix)} == block
    assert "lm_head" in kept


@pytest.fixture(scope="module")
def folders(straight: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run's model in FP8 and as it was trained."""
    target = tmp_path_factory.mktemp("fp8") / "fp8"
    done = moexpand("export", f"run={straight}", f"target={target}", "quantization=fp8")
    assert done.returncode == 0, done.stderr
    return target, exported


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_every_linear_is_rounded_and_nothing_else_is(folders: tuple[Path, Path]) -> None:
    fp8, plain = (_tensors(folder) for folder in folders)
    assert {name for name in fp8 if not name.endswith("_scale_inv")} == plain.keys()
    seen = 0
    for name, value in plain.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(fp8[name], value), name
            continue
        seen += 1
        weight, scales = fp8[name], fp8[f"{name}_scale_inv"]
        assert (weight.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        mantissa, _ = torch.frexp(scales)
        assert (mantissa == 0.5).all(), "scales are powers of two"
        largest = value.abs().max()
        assert ((dequantised(weight, scales) - value.double()).abs() <= torch.maximum(value.abs() / 16, largest * 2.0**-17)).all()
    assert seen == 2 * (4 + 3 * 128)


def test_bytes_and_scales_are_those_of_transformers_own_quantiser() -> None:
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    from moexpand.base.block_fp8 import WEIGHTS, quantise

    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="ue8m0")
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.02
    due = theirs.convert({"x.weight": weight})
    mine, scales = quantise(weight, WEIGHTS)
    assert torch.equal(scales, due["x.weight_scale_inv"].float())
    assert torch.equal(mine.view(torch.uint8), due["x.weight"].view(torch.uint8))


def test_the_folder_is_read_again_and_its_logits_are_near(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 8448, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    found = []
    for number, folder in enumerate(folders):
        out = tmp_path / f"{number}.npy"
        done = moexpand("logits", f"checkpoint={folder}", f"tokens={tmp_path / 'tokens.npy'}", f"out={out}")
        assert done.returncode == 0, done.stderr
        found.append(np.load(out))
    fp8, plain = found
    assert 0 < np.linalg.norm(fp8 - plain) / np.linalg.norm(plain - plain.mean(-1, keepdims=True)) < 0.1


def test_transformers_loads_the_folder_as_what_it_stands_for(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own loader, which takes FP8 apart; it asks for a package that it does not need for that."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    rules = FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    model, info = AutoModelForCausalLM.from_pretrained(
        folders[0], quantization_config=rules, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stored, loaded = _tensors(folders[0]), model.state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in (f"{prefix}.self_attn.{part}_proj.weight" for part in "qkvo"):
            assert torch.equal(loaded[name].double(), dequantised(stored[name], stored[f"{name}_scale_inv"]))
        stack = loaded[f"{prefix}.mlp.experts.gate_up_proj"]
        for expert in (0, 77, 127):
            name = f"{prefix}.mlp.experts.{expert}.gate_proj.weight"
            gate = dequantised(stored[name], stored[f"{name}_scale_inv"])
            assert torch.equal(stack[expert, : len(gate)].double(), gate)
