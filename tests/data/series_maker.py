"""Time series for tests: .npy files, and a tokenizer that has their tokens."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.loader import PackedData
from moexpand.data.parts import SERIES_TOKENS, series_ids
from moexpand.data.stream import Reading
from moexpand.data.tokens import load_tokenizer
from moexpand.data.units import ReadOptions

HEARD = Reading(series=True)
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for item in message.content %}"
    "{%- if item.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif item.type == 'time_series' %}{{- '<|ts|><TS_CONTEXT><|/ts|>' }}"
    "{%- else %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Writes the three tokens for a time series, as the template of a model that knows them does."""


def series_tokenizer(folder: Path) -> Path:
    """qwen-8192 with the three tokens of time series, as a Hugging Face folder."""
    folder.mkdir()
    load_tokenizer("qwen-8192").save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    spec["added_tokens"] += [
        last | {"content": token, "id": last["id"] + 1 + number} for number, token in enumerate(SERIES_TOKENS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def npy(values: np.ndarray) -> bytes:
    """A .npy file."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=True)
    return content.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    """A walk around a level, different for every seed."""
    rng = np.random.default_rng(seed)
    return rng.normal(seed, 1 + seed % 3, shape).cumsum(axis=0)


def standardised(values: np.ndarray) -> np.ndarray:
    """What a model takes, by the formula in float64."""
    whole = np.asarray(values, np.float64).reshape(len(values), -1)
    return ((whole - whole.mean(axis=0)) / (whole.std(axis=0) + 1e-8)).astype(np.float32)


def hole() -> np.ndarray:
    """A series with one value that is none."""
    values = noise(1, 40, 3)
    values[17, 2] = np.nan
    return values


def jsonl(path: Path, *rows: dict) -> Path:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(sources: Path, out: Path, tokenizer: Path, say: Callable[[str], None] = lambda line: None) -> dict:
    """`moexpand data build` in this process."""
    return build_dataset(None, [str(sources)], out, BuildOptions(ReadOptions(str(tokenizer)), 1), say)


def heard(shards: Path) -> list[tuple[str, list[float], list[np.ndarray]]]:
    """Text, rates and series of every training sample, in the order of the packs."""
    data = PackedData(shards, 2048, 1, seed=0, held_out=0.0, reading=HEARD)
    marks = set(series_ids(data.tokenizer))
    found = []
    for batch in (batch for step in range(data.packs_per_epoch) for batch in data.batch(step)):
        series, rates = iter(batch.series or []), iter(batch.rates or [])
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            ids = batch.tokens[begin:end].tolist()
            if set(ids) != {data.tokenizer.eos_id}:
                count = ids.count(series_ids(data.tokenizer)[0])
                text = data.tokenizer.decode([token for token in ids[:-1] if token not in marks])
                found.append((text, [next(rates) for _ in range(count)], [next(series) for _ in range(count)]))
    return found
