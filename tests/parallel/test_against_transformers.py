"""Loss, gradients and AdamW's path are those of transformers' model under plain autograd and torch's own AdamW."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs
from tests.parallel.runs import Micro, relative, step_arrays

INTERMEDIATE = 32


@pytest.fixture
def engine(parent: Path) -> Iterator[Any]:
    """Gradients alone: its weights stay."""
    with runs.engine(parent, {}, {"gradient": "topk"}) as built:
        yield runs.prepare(built, clip_grad=0.0, weight_decay=0.0)


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _losses(model: Any, micro: Micro) -> torch.Tensor:
    """Loss of every token [T], the segments one by one, whole vocabulary, no masks."""
    found = []
    for start, stop in zip(micro.cu_seqlens, micro.cu_seqlens[1:], strict=False):
        logits = model(torch.from_numpy(micro.tokens[start:stop])[None]).logits[0]
        found.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(micro.labels[start:stop]), reduction="none"))
    return torch.cat(found)


def _mean_loss(model: Any, arrays: list[Micro]) -> torch.Tensor:
    sums = [(_losses(model, micro) * torch.from_numpy(micro.loss_mask)).sum() for micro in arrays]
    return torch.stack(sums).sum() / sum(micro.loss_mask.sum() for micro in arrays)


def _by_checkpoint_name(named: Iterator[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """transformers stacks the experts in memory; a checkpoint names each."""
    found = {}
    for name, tensor in named:
        value = tensor.detach().numpy().copy()
        if name.endswith("experts.gate_up_proj"):
            for expert, rows in enumerate(value):
                prefix = name.replace("gate_up_proj", str(expert))
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = rows[:INTERMEDIATE], rows[INTERMEDIATE:]
        elif name.endswith("experts.down_proj"):
            for expert, rows in enumerate(value):
                found[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = rows
        else:
            found[name] = value
    return found


def test_the_loss_is_the_sum_over_unmasked_tokens_divided_by_their_number(parent: Path, engine: Any) -> None:
    model, arrays = _model(parent), step_arrays(1)
    counts = [int(micro.loss_mask.sum()) for micro in arrays]
    assert len(set(counts)) > 1, "micro-batches weigh differently, so that a mean of means would show"
    with torch.no_grad():
        losses = [_losses(model, micro).numpy() for micro in arrays]
    sums = [(each * micro.loss_mask).sum(dtype=np.float64) for each, micro in zip(losses, arrays, strict=True)]
    _, report = runs.gradients(engine, arrays)
    assert report.tokens == sum(counts)
    assert report.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert abs(report.loss - np.mean([s / c for s, c in zip(sums, counts, strict=True)])) > 1e-3
    assert engine.evaluate(runs.on_device(arrays)) == (pytest.approx(report.loss, rel=1e-6), report.tokens)


def test_every_gradient_is_that_of_transformers(parent: Path, engine: Any) -> None:
    model, arrays = _model(parent), step_arrays(0)
    _mean_loss(model, arrays).backward()
    due = _by_checkpoint_name((name, parameter.grad) for name, parameter in model.named_parameters())
    found, report = runs.gradients(engine, arrays)
    assert found.keys() == due.keys()
    distances = {name: relative(found[name], due[name]) for name in due}
    worst = max(distances, key=lambda name: distances[name])
    assert distances[worst] <= 1e-5, (worst, distances[worst])
    norm = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in due.values()))
    assert report.grad_norm == pytest.approx(norm, rel=1e-6)
    untouched = [name for name in due if not due[name].any()]
    assert all("experts" in name for name in untouched)


def test_the_weights_go_the_way_of_torchs_own_adamw(parent: Path) -> None:
    """Five steps with clipping and weight decay of matrices alone, against the transformers model."""
    lr, eps, clip = 1e-3, 1e-5, 0.5
    model, steps = _model(parent), [step_arrays(step) for step in range(5)]
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw, norms = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps), []
    for number, arrays in enumerate(steps):
        adamw.zero_grad()
        _mean_loss(model, arrays).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip)))
        for group in adamw.param_groups:
            group["lr"] = lr * (number + 1) / len(steps)
        adamw.step()
    before = _by_checkpoint_name(_model(parent).named_parameters())
    due = _by_checkpoint_name(model.named_parameters())
    with runs.engine(parent, {}, {"gradient": "topk"}) as built:
        runs.prepare(built, lr=lr, eps=eps, clip_grad=clip, weight_decay=0.1)
        reports = [built.step(runs.on_device(arrays), lr * (number + 1) / len(steps)) for number, arrays in enumerate(steps)]
        found = {name: tensor.clone().numpy() for name, tensor in built.tensors()}
    assert min(norms) > clip, "clipping was at work"
    assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=1e-4)
    moved = max(np.abs(due[name] - before[name]).max() for name in due)
    distances = {name: np.abs(found[name] - due[name]).max() for name in due}
    worst = max(distances, key=lambda name: distances[name])
    assert moved > lr
    assert distances[worst] <= 2e-3 * moved, (worst, distances[worst], moved)
