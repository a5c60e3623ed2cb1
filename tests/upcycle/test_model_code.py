"""The model code inside a child: the routing of this project, loadable by transformers, refused without consent."""

import ast
import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM

from moexpand.base import routing
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.model_code import CODE, HERE, shared
from moexpand.upcycle.model_code.generate import MODELING, generated


@pytest.fixture(scope="module")
def child(children: dict[str, Path]) -> Path:
    return children["halves_bits"]


@pytest.mark.parametrize("modeling", MODELING, ids=lambda path: path.stem)
def test_the_routing_in_the_model_code_is_the_text_of_base_routing(modeling: Path) -> None:
    assert modeling.read_text() == generated(modeling), "run python -m moexpand.upcycle.model_code.generate"
    ours = {
        node.name: ast.dump(node)
        for path in (routing.__file__, shared.__file__)
        for node in ast.parse(Path(path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    theirs = {node.name: ast.dump(node) for node in ast.parse(modeling.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {"select_experts", "route", "fp32_logits"} <= ours.keys()
    assert {name: theirs.get(name) for name in ours} == ours


def test_the_child_carries_its_code_and_names_it(child: Path) -> None:
    names = CODE["qwen3_moe_grouped"]
    assert len(names) == 2
    assert all((child / name).read_bytes() == (HERE / name).read_bytes() for name in names)
    for target in json.loads((child / "config.json").read_text())["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in (child / f"{module}.py").read_text()


def test_without_consent_to_its_code_a_child_is_refused(child: Path) -> None:
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(child, trust_remote_code=False)
    with pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(child, trust_remote_code=False)


def test_loading_finds_every_key_and_no_other(child: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if "transformers" in record.name and record.levelno >= logging.WARNING]
    opened = open_checkpoint(child)
    layer = model.model.layers[1].mlp
    assert torch.equal(layer.gate.weight, opened.read_torch("model.layers.1.mlp.gate.weight"))
    assert torch.equal(layer.experts.down_proj[300], opened.read_torch("model.layers.1.mlp.experts.300.down_proj.weight"))
    gate_up = [opened.read_torch(f"model.layers.1.mlp.experts.300.{name}_proj.weight") for name in ("gate", "up")]
    assert torch.equal(layer.experts.gate_up_proj[300], torch.cat(gate_up))


def test_saving_from_transformers_gives_the_same_folder_back(child: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="5MB")
    before, after = open_checkpoint(child), open_checkpoint(tmp_path / "again")
    assert before.architecture == after.architecture
    assert set(before.tensors) == set(after.tensors)
    assert all(before.read_bytes(name) == after.read_bytes(name) for name in before.tensors)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_router_logits_are_computed_in_fp32_in_a_bf16_model(child: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            logits, weights, chosen = gate(x)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, x.float() @ gate.weight.float().T)
        assert weights.dtype == torch.bfloat16
        assert (chosen // 64).tolist() == [list(range(8))] * 5


def test_generation_runs(child: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    tokens = model.generate(
        torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    step = torch.tensor([[5, 6, 7]])
    for _ in range(4):
        with torch.no_grad():
            step = torch.cat([step, model(step).logits[:, -1:].argmax(-1)], 1)
    assert tokens.tolist() == step.tolist()


def test_the_balance_loss_counts_the_experts_really_visited(child: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    tokens, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12)
    mask[1, 8:] = 0
    with torch.no_grad():
        out = model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
        plain = model(tokens, attention_mask=mask, labels=tokens)
    assert plain.aux_loss is None
    counts, sums, kept = torch.zeros(512), torch.zeros(512), mask.flatten().bool()
    for layer in out.router_logits:
        probabilities = layer[kept].softmax(-1)
        best = probabilities.reshape(-1, 8, 64).argmax(-1) + 64 * torch.arange(8)
        counts += torch.bincount(best.flatten(), minlength=512)
        sums += probabilities.sum(0)
    rows = 2 * kept.sum()
    due = 512 * (counts / rows * sums / rows).sum()
    torch.testing.assert_close(out.aux_loss, due)
    torch.testing.assert_close(out.loss, plain.loss + 0.001 * due)


def test_layers_without_experts_stay_dense(child: Path) -> None:
    config = AutoConfig.from_pretrained(child, trust_remote_code=True, mlp_only_layers=[1])
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert [hasattr(layer.mlp, "gate") for layer in model.model.layers] == [True, False]
    assert model(torch.arange(10)[None]).logits.isfinite().all()


def test_the_forward_pass_takes_what_transformers_own_takes(child: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    assert inspect.signature(type(model).forward) == inspect.signature(Qwen3MoeForCausalLM.forward)
    tokens, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad():
        whole, last = model(tokens, mask).logits, model(tokens, mask, logits_to_keep=1, return_dict=False)[0]
    torch.testing.assert_close(last, whole[:, -1:])
