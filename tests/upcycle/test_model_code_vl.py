"""The model code inside a grouped child of Qwen3-VL-MoE: transformers' own model but for the router, refused without consent.

The child is the writer's, and the reference is transformers' parent class with the parent's experts in their slots, put there by
hand, and a router of its own.
"""

import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeTextModel,
)

from moexpand.upcycle.families import family_of
from moexpand.upcycle.inits import Init
from moexpand.upcycle.model_code import CODE, HERE
from tests import parents
from tests.upcycle.stacks import Tensors
from tests.upcycle.vl_parent import COPIES, DENSE, END, EXPERTS, HIDDEN, IMAGE, LAYERS, START, TOP_K, parent_model

SPARSE = [layer for layer in range(LAYERS) if layer != DENSE]
AUTO = AutoModelForImageTextToText


@dataclass
class Child:
    """A folder, and the tensors that are in it in the form that transformers runs ([experts, out, in])."""

    folder: Path
    groups: int
    state: Tensors
    files: Tensors


def make_child(parent: Path, folder: Path, groups: int, layout: str = "fused") -> Child:
    """Write a child: every layer with a map of its own, every router row with noise of its own."""
    noise = Init(router_noise=0.3, keep_first=False)
    wishes = {"placement": "random_balanced", "experts_layout": layout, "init": noise, "default_noise": False}
    parents.make_child(parent, folder, num_experts=EXPERTS * COPIES, num_groups=groups, max_shard_size="1GB", **wishes)
    state, (file,) = load_file(parent / "model.safetensors"), folder.glob("*.safetensors")
    files, rows = load_file(file), json.loads((folder / "expansion.json").read_text())["slot_to_parent"]
    for layer in SPARSE:
        mlp = f"model.language_model.layers.{layer}.mlp."
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            state[mlp + name] = state[mlp + name][rows[layer]]
        state[f"{mlp}gate.weight"] = files[f"{mlp}gate.weight"]
    return Child(folder, groups, state, files)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers 5 saves it: stacks are [experts, out, in], not transposed as on the hub."""
    folder = tmp_path_factory.mktemp("vl") / "parent"
    parent_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[4, 2], ids=["one of every group", "two of every group"])
def child(parent: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Child:
    return make_child(parent, tmp_path_factory.mktemp("vl") / "child", groups=request.param)


@pytest.fixture(scope="module")
def model(child: Child) -> Any:
    return AUTO.from_pretrained(child.folder, trust_remote_code=True).eval()


def route_by_hand(logits: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and weights [T, K] in float64, expert by expert."""
    chosen, weights = [], []
    for row in logits.astype(np.float64):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        size, best = len(row) // groups, []
        for group in range(groups):
            members = sorted(range(group * size, (group + 1) * size), key=lambda expert: -probabilities[expert])
            best += members[: TOP_K // groups]
        chosen.append(best)
        weights.append(probabilities[best] / probabilities[best].sum())
    return np.array(chosen), np.array(weights)


def reference(child: Child) -> Qwen3VLMoeForConditionalGeneration:
    """transformers' own parent class with the child's tensors, routed by `route_by_hand`."""
    config = Qwen3VLMoeConfig(**json.loads((child.folder / "config.json").read_text()))
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    model.load_state_dict(child.state)
    for layer in SPARSE:
        gate = model.model.language_model.layers[layer].mlp.gate

        def forward(x: torch.Tensor, gate: Any = gate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = x.reshape(-1, HIDDEN) @ gate.weight.T
            chosen, weights = route_by_hand(logits.detach().numpy(), child.groups)
            return logits, torch.from_numpy(weights).float(), torch.from_numpy(chosen)

        gate.forward = forward
    return model


def image_inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two texts, each with a picture of 4 x 4 patches, which become 2 x 2 tokens."""
    numbers = torch.Generator().manual_seed(seed)
    row = [5, START, *[IMAGE] * 4, END, 7, 8]
    tokens = torch.tensor([row, row])
    tokens[1, -1] = 9
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=numbers),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def test_the_child_carries_its_code_and_names_it(child: Child) -> None:
    names = CODE["qwen3_vl_moe_grouped"]
    assert len(names) == 2
    assert all((child.folder / name).read_bytes() == (HERE / name).read_bytes() for name in names)
    for target in family_of("qwen3_vl_moe_grouped").auto_map.values():
        module, name = target.split(".")
        assert f"class {name}(" in (child.folder / f"{module}.py").read_text()


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AUTO], ids=lambda auto: auto.__name__)
def test_without_consent_to_its_code_a_child_is_refused(child: Child, auto: Any) -> None:
    with pytest.raises(ValueError, match="custom code"):
        auto.from_pretrained(child.folder, trust_remote_code=False)


def test_the_decoder_alone_is_refused_too(model: Any) -> None:
    with pytest.raises(ValueError, match="Qwen3VLMoeGroupedTextConfig"):
        AutoModel.from_config(model.config.text_config)


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_loading_finds_every_key_and_no_other(
    parent: Path, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = make_child(parent, tmp_path / "child", groups=4, layout=layout)
    with caplog.at_level(logging.WARNING):
        model, info = AUTO.from_pretrained(child.folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if "transformers" in record.name and record.levelno >= logging.WARNING]
    loaded = model.state_dict()
    assert loaded.keys() == child.state.keys()
    assert all(torch.equal(loaded[name], child.state[name]) for name in loaded)


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_saving_from_transformers_gives_the_same_tensors_back(parent: Path, layout: str, tmp_path: Path) -> None:
    child = make_child(parent, tmp_path / "child", groups=4, layout=layout)
    model = AUTO.from_pretrained(child.folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="300KB")
    shards = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(shards) > 1
    saved = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert saved.keys() == child.files.keys()
    assert all(torch.equal(saved[name], child.files[name]) for name in saved)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (child.folder, tmp_path / "again"))
    assert after["auto_map"] == before["auto_map"]
    assert (
        after["text_config"].items()
        >= {key: before["text_config"][key] for key in after["text_config"] if key != "dtype"}.items()
    )
    again = AUTO.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(model(torch.arange(10)[None]).logits, again(torch.arange(10)[None]).logits)


def test_a_model_that_was_never_loaded_is_saved_stacked_and_transposed(child: Child, model: Any, tmp_path: Path) -> None:
    fresh = type(model)(model.config)
    fresh.load_state_dict(child.state)
    fresh.save_pretrained(tmp_path / "fresh")
    saved = load_file(tmp_path / "fresh" / "model.safetensors")
    assert saved.keys() == child.files.keys()
    assert all(torch.equal(saved[name], child.files[name]) for name in saved)


def test_the_bare_model_loads_the_same_tensors(child: Child) -> None:
    bare = AutoModel.from_pretrained(child.folder, trust_remote_code=True)
    assert all(torch.equal(value, child.state[f"model.{name}"]) for name, value in bare.state_dict().items())


def test_a_sparse_layer_is_its_closed_form_in_float64(child: Child, model: Any) -> None:
    x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model.model.language_model.layers[2].mlp(x)
    prefix = "model.language_model.layers.2.mlp."
    x64 = x.double().numpy().reshape(-1, HIDDEN)
    # Straight from the file: [experts, in, out], gates first.
    gate_up, down = (child.files[f"{prefix}experts.{name}"].double().numpy() for name in ("gate_up_proj", "down_proj"))
    chosen, weights = route_by_hand(x64 @ child.files[f"{prefix}gate.weight"].double().numpy().T, child.groups)
    due = np.zeros_like(x64)
    for token, experts in enumerate(chosen):
        for weight, expert in zip(weights[token], experts, strict=True):
            gate, up = np.split(x64[token] @ gate_up[expert], 2)
            due[token] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[expert])
    np.testing.assert_allclose(out.reshape(-1, HIDDEN).numpy(), due, rtol=1e-4, atol=1e-5)


def test_text_logits_are_those_of_the_parents_class_with_a_grouped_router(child: Child, model: Any) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(child)(tokens).logits, rtol=1e-4, atol=1e-4)


def test_logits_after_an_image_are_those_of_the_parents_class_with_a_grouped_router(child: Child, model: Any) -> None:
    inputs = image_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, reference(child)(**inputs).logits, rtol=1e-4, atol=1e-4)
        other = model(**{**inputs, "pixel_values": image_inputs(seed=1)["pixel_values"]}).logits
    torch.testing.assert_close(logits[:, :2], other[:, :2], rtol=1e-4, atol=1e-4)
    assert (logits[:, 2:] - other[:, 2:]).abs().max() > 0.1


def test_experts_run_as_one_grouped_product_or_one_by_one(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    for stock in Qwen3VLMoeForConditionalGeneration.__mro__ + Qwen3VLMoeTextModel.__mro__:
        if "_can_set_experts_implementation_cached_value" in vars(stock):  # remembered from a parent that ran before
            monkeypatch.delattr(stock, "_can_set_experts_implementation_cached_value")
    grouped, loop = (
        AUTO.from_pretrained(child.folder, trust_remote_code=True, experts_implementation=kind) for kind in (None, "eager")
    )
    assert grouped.model.language_model.config._experts_implementation == "grouped_mm"
    assert loop.model.language_model.config._experts_implementation == "eager"
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens).logits, loop(tokens).logits, rtol=1e-4, atol=1e-4)


def test_router_logits_are_computed_in_fp32_in_a_bf16_model(child: Child) -> None:
    model = AUTO.from_pretrained(child.folder, trust_remote_code=True, dtype=torch.bfloat16)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate, size = model.model.language_model.layers[0].mlp.gate, EXPERTS * COPIES // child.groups
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            logits, weights, chosen = gate(x)
        assert torch.equal(logits, x.float() @ gate.weight.float().T)
        assert weights.dtype == torch.bfloat16
        assert (chosen // size).tolist() == [sorted(list(range(child.groups)) * (TOP_K // child.groups))] * 5


def test_generation_after_an_image_is_the_greedy_path_of_the_forward_pass(model: Any) -> None:
    inputs = image_inputs()
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    step = dict(inputs)
    for _ in range(3):
        with torch.no_grad():
            best = model(**step).logits[:, -1:].argmax(-1)
        step["input_ids"] = torch.cat([step["input_ids"], best], 1)
        step["attention_mask"] = torch.ones_like(step["input_ids"])
        step["mm_token_type_ids"] = torch.nn.functional.pad(step["mm_token_type_ids"], (0, 1))
    assert tokens.tolist() == step["input_ids"].tolist()


def test_the_forward_pass_takes_what_transformers_own_takes(model: Any) -> None:
    assert inspect.signature(type(model).forward) == inspect.signature(Qwen3VLMoeForConditionalGeneration.forward)
    tokens, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad():
        whole, last = model(tokens, mask).logits, model(tokens, mask, logits_to_keep=1, return_dict=False)[0]
    torch.testing.assert_close(last, whole[:, -1:])


def test_the_balance_loss_counts_the_experts_really_visited(child: Child, model: Any) -> None:
    tokens, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12)
    mask[1, 8:] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
        plain = model(tokens, attention_mask=mask, labels=tokens)
    assert plain.aux_loss is None
    assert len(out.router_logits) == len(SPARSE)
    counts, sums, rows, kept = np.zeros(EXPERTS * COPIES), np.zeros(EXPERTS * COPIES), 0, mask.flatten().bool()
    for layer in out.router_logits:
        logits = layer[kept].double()
        chosen, _ = route_by_hand(logits.numpy(), child.groups)
        counts += np.bincount(chosen.flatten(), minlength=EXPERTS * COPIES)
        sums += logits.softmax(-1).sum(0).numpy()
        rows += len(logits)
    due = EXPERTS * COPIES * float((counts / rows * sums / rows).sum())
    assert out.aux_loss.item() == pytest.approx(due, rel=1e-5)
    assert out.loss.item() == pytest.approx(plain.loss.item() + 0.001 * due, rel=1e-5)
