"""Time series for tests: .npy files, and a tokenizer that has their tokens."""

import io
import json
from pathlib import Path

import numpy as np

from moexpand.data.parts import SERIES_TOKENS
from moexpand.data.tokens import load_tokenizer

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
