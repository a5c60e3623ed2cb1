"""What the layout tests run on every rank: an engine on a parent or child, packed batches that can be learnt, curves, gradients."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Micro:
    """A micro-batch as the loader gives it: numpy arrays of one packed stream."""

    def __init__(self, segments: list[Any], masks: list[Any]) -> None:
        import numpy as np

        self.tokens = np.concatenate(segments)
        self.labels = np.concatenate([np.roll(segment, -1) for segment in segments])
        self.positions = np.concatenate([np.arange(len(segment)) for segment in segments])
        self.loss_mask = np.concatenate(masks).astype(np.float32)
        self.cu_seqlens = np.cumsum([0] + [len(segment) for segment in segments]).astype(np.int32)


def micro_batch(number: int, tokens: int = 64, vocab: int = 256) -> Micro:
    """Segments of varied lengths of arithmetic sequences (learnable), with masked prompts of varied lengths."""
    import numpy as np

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
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str, rows: slice | None) -> torch.Tensor:
        with safe_open(folder / index[name], "pt") as file:
            tensor = file.get_tensor(name)
        return tensor if rows is None else tensor[rows]

    return read


def shape_of(folder: Path) -> Any:
    from moexpand.parallel.shape import ModelShape

    config = json.loads((folder / "config.json").read_text())
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts num_experts_per_tok "
        "moe_intermediate_size norm_topk_prob rope_theta rms_norm_eps tie_word_embeddings"
    ).split()
    return ModelShape(router_n_groups=config.get("router_n_groups", 1), **{name: config[name] for name in names})


def engine(folder: Path, layout: dict[str, Any], rules: dict[str, Any], precision: str = "fp32") -> Any:
    from moexpand.parallel import ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import Layout, RouterRules

    here = ranks.start(Layout(**layout), timeout_seconds=120)
    built = Engine(shape_of(folder), Layout(**layout), RouterRules(**rules), precision, here)
    built.fill(reader(folder))
    return built


def device_batches(built: Any, step: int, global_batch: int = 4, distinct: int = 4) -> list[Any]:
    """This data rank's micro-batches of a step: the global batch is the same whatever the layout."""
    from moexpand.parallel.batch import PackedBatch

    numbers = [(step % distinct) * global_batch + index for index in range(global_batch)]
    mine = numbers[built.ranks.data_rank :: built.ranks.data_size]
    batches = [PackedBatch.from_arrays(micro_batch(number), torch.device("cpu")) for number in mine]
    return batches


def curve(
    folder: Path, layout: dict[str, Any], rules: dict[str, Any], steps: int, precision: str = "fp32", lr: float = 1e-3
) -> Any:
    """Loss, gradient norm and balance loss of each step."""
    from moexpand.parallel import ranks
    from moexpand.parallel.optimizer import AdamSettings

    built = engine(folder, layout, rules, precision)
    built.prepare_training(AdamSettings(lr=lr))
    rows = []
    for step in range(steps):
        report = built.step(device_batches(built, step), lr)
        rows.append((report.loss, report.grad_norm, report.balance.tolist(), report.tokens))
    ranks.stop()
    return rows
