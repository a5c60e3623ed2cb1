"""From `moexpand train` to the first step, on one rank, beside what importing torch and Megatron-Core alone takes.

Four things take turns, each in a process of its own: `import torch`, the imports of torch and Megatron-Core's GPT model,
`moexpand --help`, and the whole command until its first step stands in metrics.jsonl, with a tiny model on the shards of this
project's own pages. The command starts three processes one after the other (itself, torchrun, the worker), of which the last two
import torch. `python bench/startup.py [rounds]` prints medians, and how much of the way is no import of these.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEGATRON = "import torch, megatron.core.models.gpt, megatron.core.optimizer, megatron.core.dist_checkpointing"
TINY = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=2",
    "model.head_dim=16", "model.moe_intermediate_size=8", "train.steps=1", "train.global_batch=1", "train.seq_length=64",
    "track.wandb=off", "plain=true",
]  # fmt: skip


def seconds(*words: str) -> float:
    """Wall time of a Python process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def until_first_step(shards: Path, run: Path) -> tuple[float, float]:
    """Seconds from the start of the command to its first row of metrics, and to its end."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "moexpand", "train", f"data.shards={shards}", f"run.dir={run}", *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, first = run / "metrics.jsonl", 0.0
    while process.poll() is None:
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - began
        time.sleep(0.005)
    assert process.returncode == 0, "the command failed"
    return first, time.perf_counter() - began


def main(rounds: int) -> None:
    """Measure and print."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        seconds("-m", "moexpand", "data", "build", f"sources=[{ROOT / 'docs'}]", f"out={shards}", "tokenizer=qwen-8192")
        for number in range(rounds + 1):
            if number == 1:
                found.clear()  # the first round fills the disk's cache
            found.setdefault("import torch", []).append(seconds("-c", "import torch"))
            found.setdefault("import torch and Megatron-Core", []).append(seconds("-c", MEGATRON))
            found.setdefault("moexpand --help", []).append(seconds("-m", "moexpand", "--help"))
            first, end = until_first_step(shards, Path(scratch) / f"run{number}")
            found.setdefault("moexpand train, to the first step", []).append(first)
            found.setdefault("moexpand train, to the end", []).append(end)
    median = {name: statistics.median(values) for name, values in found.items()}
    print(f"torch {version('torch')}, megatron-core {version('megatron-core')}, Python {sys.version.split()[0]}; {rounds} rounds")
    for name, value in median.items():
        print(f"  {name:<34} {value:6.2f} s   ({min(found[name]):.2f} to {max(found[name]):.2f})")
    imports = median["import torch"] + median["import torch and Megatron-Core"]
    first = median["moexpand train, to the first step"]
    print(f"of the way to the first step {imports:.2f} s are imports (torch in torchrun, Megatron-Core in the worker)")
    print(f"and {first - imports:.2f} s are not")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
