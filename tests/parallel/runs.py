"""What the layout tests run on every rank: an engine, packed batches that can be learnt, curves, gradients."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open


class Micro:
    """A micro-batch as the loader gives it: numpy arrays of one packed stream."""

    def __init__(self, segments: list[Any], masks: list[Any]) -> None:
        self.tokens = np.concatenate(segments)
        self.labels = np.concatenate([np.roll(segment, -1) for segment in segments])
        self.positions = np.concatenate([np.arange(len(segment)) for segment in segments])
        self.loss_mask = np.concatenate(masks).astype(np.float32)
        self.cu_seqlens = np.cumsum([0] + [len(segment) for segment in segments]).astype(np.int32)


def micro_batch(number: int, tokens: int = 64, vocab: int = 256) -> Micro:
    """Segments of varied lengths of arithmetic sequences (learnable), with masked prompts of varied lengths."""
    generator = np.random.default_rng(number)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(generator.integers(2, 24)), tokens - sum(lengths)))
    segments, masks = [], []
    for length in lengths:
        start, stride = generator.integers(0, vocab), generator.integers(1, 4)
        segments.append((start + stride * np.arange(length)) % vocab)
        mask = np.ones(length)
        mask[: generator.integers(0, max(1, length // 2))] = 0
        mask[-1] = 0
        masks.append(mask)
    return Micro(segments, masks)


def reader(folder: Path) -> Any:
    """Reads tensors of a folder through the safetensors library, independently of our own reader."""
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(folder / name, "pt") for name in set(index.values())}

    def read(name: str, rows: slice | None) -> torch.Tensor:
        if name.endswith(".e_score_correction_bias") and name not in index:
            return torch.zeros(config["num_experts"])
        tensor = files[index[name]].get_tensor(name)
        return tensor if rows is None else tensor[rows]

    return read


def shape_of(folder: Path, **changes: Any) -> Any:
    from moexpand.parallel.shape import ModelShape

    config = json.loads((folder / "config.json").read_text())
    words = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts "
        "num_experts_per_tok moe_intermediate_size norm_topk_prob rope_theta rms_norm_eps tie_word_embeddings"
    )
    names = words.split()
    read = {name: config[name] for name in names} | {"router_n_groups": config.get("router_n_groups", 1)}
    return ModelShape(**(read | changes))


@contextmanager
def engine(
    folder: Path, layout: dict[str, Any], rules: dict[str, Any], precision: str = "fp32", shape: dict[str, Any] | None = None
) -> Iterator[Any]:
    """An engine filled from a folder; see `built_engine`."""
    with built_engine(shape_of(folder, **(shape or {})), reader(folder), layout, rules, precision) as built:
        yield built


@contextmanager
def built_engine(
    shape: Any, read: Any, layout: dict[str, Any], rules: dict[str, Any] | None = None, precision: str = "fp32"
) -> Iterator[Any]:
    """An engine of a shape, filled by a reader; the process groups are left at the end.

    Without torchrun's environment variables this process is a world of one rank, so it works inside pytest too.
    """
    from moexpand.parallel import ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import Layout, RouterRules

    here = ranks.start(Layout(**layout), timeout_seconds=120)
    try:
        built = Engine(shape, Layout(**layout), RouterRules(**(rules or {})), precision, here)
        built.fill(read)
        yield built
    finally:
        ranks.stop()
        if "MASTER_PORT" in os.environ:  # a rank that is quicker would meet the others' old store under the old port
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def on_device(arrays: list[Any]) -> list[Any]:
    """Micro-batches as the engine takes them."""
    from moexpand.parallel.batch import PackedBatch

    return [PackedBatch.from_arrays(each, torch.device("cpu")) for each in arrays]


def step_arrays(step: int, global_batch: int = 4, distinct: int = 4) -> list[Micro]:
    """The micro-batches of a step; they come again every `distinct` steps, so that they can be learnt."""
    return [micro_batch((step % distinct) * global_batch + index) for index in range(global_batch)]


def device_batches(built: Any, step: int) -> list[Any]:
    """This data rank's micro-batches of a step: the global batch is the same whatever the layout."""
    return on_device(step_arrays(step)[built.ranks.data_rank :: built.ranks.data_size])


def prepare(built: Any, **settings: Any) -> Any:
    """Wrap and build the optimiser; returns the engine."""
    from moexpand.parallel.optimizer import AdamSettings

    built.prepare_training(AdamSettings(**settings))
    return built


@dataclass(frozen=True)
class Row:
    """What one step reported, free of tensors."""

    loss: float
    grad_norm: float
    tokens: int
    balance: list[float]
    group_balance: list[float]
    z_loss: list[float]
    dispatched: list[list[float]]


Recording = list[list[np.ndarray]]
"""Routes of every step and every micro-batch of its global batch."""


def train(
    built: Any,
    first: int,
    last: int,
    lr: float = 1e-3,
    replay: Recording | None = None,
    record: Recording | None = None,
) -> list[Row]:
    """Steps first ... last - 1, with given routes, or adding to `record` those of this data rank."""
    rows, data = [], slice(built.ranks.data_rank, None, built.ranks.data_size)
    for step in range(first, last):
        routes = None if replay is None else replay[step][data]
        report = built.step(device_batches(built, step), lr, routes=routes, record=record is not None)
        if record is not None:
            record.append(report.routes)
        losses = (report.balance.tolist(), report.group_balance.tolist(), report.z_loss.tolist())
        rows.append(Row(report.loss, report.grad_norm, report.tokens, *losses, report.dispatched.tolist()))
    return rows


@dataclass(frozen=True)
class Job:
    """One curve: a folder on a layout."""

    folder: Path
    layout: dict[str, Any]
    rules: dict[str, Any]
    precision: str = "fp32"
    steps: int = 20
    replay: Recording | None = None
    shape: dict[str, Any] | None = None


def curves(jobs: list[Job]) -> list[list[Row]]:
    """Several curves, one after the other on the same ranks."""
    found = []
    for job in jobs:
        with engine(job.folder, job.layout, job.rules, job.precision, job.shape) as built:
            found.append(train(prepare(built), 0, job.steps, replay=job.replay))
    return found


def recorded_curve(job: Job) -> tuple[list[Row], Recording]:
    """A curve on one rank and its routes."""
    record: Recording = []
    with engine(job.folder, job.layout, job.rules, job.precision) as built:
        return train(prepare(built), 0, job.steps, record=record), record


def logits(jobs: list[tuple[Path, dict[str, Any]]], tokens_BS: np.ndarray, precision: str = "fp32") -> list[Any]:
    """Logits [B, S, V] of each (folder, layout), None off the last stage. Every data rank takes the rows in another order."""
    from moexpand.parallel.batch import PackedBatch

    found: list[Any] = []
    for folder, layout in jobs:
        with engine(folder, layout, {}, precision) as built:
            order = np.roll(np.arange(len(tokens_BS)), built.ranks.data_rank)
            outputs, _ = built.logits([PackedBatch.from_sequences(torch.from_numpy(tokens_BS[[row]])) for row in order])
            if built.ranks.last_stage:
                found.append(np.stack([each.numpy() for each in outputs])[np.argsort(order)])
            else:
                found.append(None)
    return found


def gradients(built: Any, arrays: list[Any]) -> tuple[dict[str, np.ndarray], Any]:
    """Gradient of the mean loss by Hugging Face name and the step's report; the weights stay. For one rank, without clipping."""
    from moexpand.parallel import weights

    report = built.step(on_device(arrays), 0.0)
    found = weights.collect(built.stages, built.shape, lambda parameter: parameter.main_grad)
    return {name: value.clone().numpy() for name, value in found}, report


Block = tuple[str, tuple[int, ...], slice | None, slice | None, np.ndarray]
"""A part of a tensor's gradient: name, shape of the whole, rows, columns, values (NaN where another rank holds them)."""


def gradient_blocks(jobs: list[Job]) -> list[tuple[list[Block], Row]]:
    """This rank's parts of all gradients of one step, and what the step reported."""
    return [_gradient_blocks(job) for job in jobs]


def _gradient_blocks(job: Job) -> tuple[list[Block], Row]:
    with engine(job.folder, job.layout, job.rules, job.precision) as built:
        prepare(built, clip_grad=0.0, weight_decay=0.0)
        (row,) = train(built, 0, 1, lr=0.0, replay=job.replay)
        return held_blocks(built), row


def held_blocks(built: Any) -> list[Block]:
    """This rank's parts of all gradients of the last step."""
    from moexpand.parallel import weights

    def held(parameter: Any) -> torch.Tensor:
        """The gradient where this data-parallel rank's share of it lies."""
        found = torch.full_like(parameter.main_grad, torch.nan)
        for part in built.optimizer.chained_optimizers:
            if parameter in part.model_param_gbuf_map:
                span = part._get_model_param_range_map(parameter)["param"]
                own = slice(span.start, span.end)
                found.view(-1)[own] = parameter.main_grad.view(-1)[own]
        return found

    return [
        (part.name, part.shape, part.rows, part.columns, part.local.clone().numpy())
        for part in weights.parts(built.stages, built.shape, held)
    ]


def merged(ranks: list[list[Block]]) -> dict[str, np.ndarray]:
    """Whole gradients by name from all ranks' parts; what no rank holds stays NaN."""
    found: dict[str, np.ndarray] = {}
    for blocks in ranks:
        for name, shape, rows, columns, values in blocks:
            whole = found.setdefault(name, np.full(shape, np.nan, values.dtype))
            place = whole[rows or slice(None)] if columns is None else whole[rows or slice(None), columns]
            np.copyto(place, values, where=~np.isnan(values))
    return found


def restored(engine_of: Any, batches: Any, part: str, folder: Path, save: dict[str, Any], load: dict[str, Any]) -> bool:
    """Whether the weights of a part of the first stage after a step, saved on one layout, come back on another.

    Args:
        engine_of: makes a context with an engine of a layout.
        batches: makes this rank's micro-batches for an engine.
        part: its name in a stage: vision or time_series.
    """
    from moexpand.parallel import checkpoint, ranks

    def held(built: Any) -> list[np.ndarray]:
        return [value.numpy().copy() for value in getattr(built.stages[0], part).state_dict().values()]

    with engine_of(save) as built:
        prepare(built)
        built.step(batches(built), 1e-2)
        due = ranks.broadcast(held(built) if built.ranks.main else None)
        if built.ranks.main:
            folder.mkdir()
        ranks.barrier()
        checkpoint.save(built, folder, {})
    with engine_of(load) as built:
        prepare(built)
        before = held(built) if built.ranks.first_stage else due
        checkpoint.load(built, folder)
        after = held(built) if built.ranks.first_stage else due
    changed = any(not np.array_equal(one, other) for one, other in zip(before, due, strict=True)) or not built.ranks.first_stage
    return changed and all(np.array_equal(one, other) for one, other in zip(after, due, strict=True))


def relative(found: np.ndarray, due: np.ndarray) -> float:
    """Largest difference over the largest magnitude that is due (1 where all of it is zero)."""
    return float(np.abs(found - due).max() / (np.abs(due).max() or 1.0))
