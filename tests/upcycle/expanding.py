"""A small parent written without torch, its recipe, and a program that expands it: what tests of the writer run in processes.

`python tests/upcycle/expanding.py PARENT TARGET [key=value ...]` prints the summary as JSON, and errors as the command does.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import MoexpandError
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.folder import write_checkpoint
from moexpand.upcycle.fresh_config import architecture_config
from moexpand.upcycle.plan import Plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import nbytes
from moexpand.upcycle.tensors import stored_tensors
from moexpand.upcycle.writer import expand

EXPERTS, COPIES = 4, 4
ROOT = Path(__file__).resolve().parents[2]


def write_parent(folder: Path, layers: int = 4, hidden: int = 128, intermediate: int = 96, shard: str = "400KB") -> Path:
    """A random bf16 parent of 4 experts with side files; norms are no multiples of a block, experts are whole blocks."""
    arch = Architecture(
        vocab_size=130, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=intermediate, dtype="bfloat16",
    )  # fmt: skip
    random = np.random.default_rng(0)
    tensors = {name: ("BF16", shape) for name, shape in stored_tensors(arch).items()}

    def produce(name: str) -> np.ndarray:
        return random.integers(0, 0x7F, size=nbytes(*tensors[name]), dtype=np.uint8)

    write_checkpoint(folder, architecture_config(arch), tensors, produce, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def recipe_of(parent: Path, **settings: Any) -> Recipe:
    """Four copies of every expert in two groups; `settings` are fields of the plan."""
    opened = open_checkpoint(parent)
    rows = (tuple(range(EXPERTS)) * COPIES,) * opened.architecture.num_hidden_layers
    plan = Plan(
        parent=opened.fingerprint, num_experts=EXPERTS * COPIES, num_groups=2, placement="map", slot_to_parent=rows, **settings
    )
    return Recipe(opened, plan)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(parent: Path, target: Path, **words: object) -> "subprocess.Popen[str]":
    """Start this program."""
    command = [sys.executable, __file__, str(parent), str(target), *(f"{key}={value!r}" for key, value in words.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def main(parent: str, target: str, *words: str) -> int:
    """Expand; keys are those of `expand`, or of the plan when they begin with `plan_`."""
    values = {key: eval(value) for key, _, value in (word.partition("=") for word in words)}
    settings = {key.removeprefix("plan_"): values.pop(key) for key in list(values) if key.startswith("plan_")}
    try:
        summary = expand(recipe_of(Path(parent), **settings), Path(target), **values)
    except MoexpandError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
