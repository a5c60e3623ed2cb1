"""What a training step costs beyond Megatron-Core's schedule and optimiser, on the quickstart's parent and on one rank.

The real loop runs on shards of this project's own pages, with everything that is on by default: data, figures of every layer,
metrics, W&B offline, guard, watchdog. From the beginning of one step to that of the next, minus what Megatron-Core's
forward-backward function and the optimiser's update take, is ours. `python bench/overhead.py [steps]` prints medians and their
ratio; more than 3 % fails. Steps at which the routers are looked at (every tenth, by default) are printed apart.
"""

import itertools
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.03


def measure(folder: Path, steps: int) -> list[tuple[float, float, float]]:
    """Of each step: seconds to the next one, in the engine's step, in Megatron-Core."""
    from moexpand.cli import main as moexpand
    from moexpand.conf.compose import compose_words
    from moexpand.parallel import engine, optimizer
    from moexpand.train.signals import StopRequest
    from moexpand.train.work import run

    shards = folder / "shards"
    assert moexpand(["data", "build", f"sources=[{ROOT / 'docs'}]", f"out={shards}", "tokenizer=qwen-8192", "workers=1"]) == 0
    begun: list[float] = []
    inside: list[float] = []
    megatron: list[float] = []

    def timed(work: Any, into: list[float]) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                into[-1] += time.perf_counter() - began

        return wrapped

    true_step, true_function = engine.Engine.step, engine.get_forward_backward_func

    def step(*arguments: Any, **options: Any) -> Any:
        begun.append(time.perf_counter())
        inside.append(0.0)
        megatron.append(0.0)
        return timed(true_step, inside)(*arguments, **options)

    engine.Engine.step = step  # type: ignore[method-assign]
    engine.get_forward_backward_func = lambda: timed(true_function(), megatron)
    optimizer.update = timed(optimizer.update, megatron)
    words = ["experiment=quickstart_parent", f"data.shards={shards}", f"run.dir={folder / 'run'}", f"train.steps={steps}"]
    words += ["evaluate.every=0", "optim.warmup_steps=0", "optim.decay_steps=0", "plain=true"]
    config = compose_words("train", words)
    Path(config.run.dir).mkdir()
    run(config, StopRequest())
    periods = [after - before for before, after in itertools.pairwise(begun)]
    return list(zip(periods, inside, megatron, strict=False))


def main(steps: int) -> int:
    """Measure and print; returns whether the target is missed."""
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), steps)[1:]  # the first step makes buffers
    looked_at = [row for number, row in enumerate(found, 2) if number % 10 == 0]
    ordinary = [row for number, row in enumerate(found, 2) if number % 10]
    print(f"torch {version('torch')}, megatron-core {version('megatron-core')}; {len(found)} steps of the quickstart's parent")
    for name, rows in (("ordinary steps", ordinary), ("with a look at the routers", looked_at)):
        period, inside, megatron = (statistics.median(column) for column in zip(*rows, strict=True))
        share = statistics.median((whole - core) / core for whole, _, core in rows)
        spent = f"{period:.4f} s from step to step, {inside:.4f} in the engine, {megatron:.4f} in Megatron-Core"
        print(f"  {name}: {spent}; ours {share:.2%}")
    share = statistics.median((whole - core) / core for whole, _, core in ordinary)
    print(f"our loop costs {share:.2%} of Megatron-Core's step (target at most {TARGET:.0%})")
    return int(share > TARGET)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
