"""A whole training step of the quickstart's parent: our engine against transformers, one process each, taking turns.

Same weights, tokens, threads, AdamW and clipping; transformers with sdpa attention and its grouped_mm experts. Each has a process
of its own because our engine changes how a process gets its memory, which makes transformers faster too. A turn is four steps;
the first finds caches that the other process has filled and is counted apart. Prints medians of tokens a second, both ratios and
the versions. `python bench/train_step.py [turns [folder]]`: a random parent and random tokens, whose routers send some experts
nothing and others many times the mean, or the parent and the tokens of a finished quickstart (folder).
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
LAYERS, SEQUENCES, LENGTH, VOCABULARY = 4, 4, 512, 8448
STEPS_OF_A_TURN = 4


def transformers_step(folder: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """One step of transformers' model; returns its loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def engine_step(folder: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """One step of our engine; returns its loss."""
    from moexpand.parallel import ranks
    from moexpand.parallel.batch import PackedBatch
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.optimizer import AdamSettings
    from moexpand.parallel.shape import Layout, RouterRules
    from moexpand.train import weights
    from moexpand.train.setup import shape_of
    from moexpand.upcycle.checkpoint import open_checkpoint
    from moexpand.upcycle.logical import StoredWeights

    stored = StoredWeights(open_checkpoint(folder))
    engine = Engine(shape_of(stored.architecture), Layout(), RouterRules(), "fp32", ranks.start(Layout()))
    weights.load(engine, stored)
    engine.prepare_training(AdamSettings())
    batch = PackedBatch.from_sequences(tokens)
    return lambda: engine.step([batch], 1e-3).loss


def write_parent(folder: Path) -> None:
    """A random parent of the quickstart's shape, written by transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=48, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


STEPS = {"moexpand": engine_step, "transformers": transformers_step}


def serve(name: str, folder: Path, tokens: torch.Tensor, pipe: Connection) -> None:
    """A process that takes the steps of a turn and reports its last loss and the seconds of each, when told to."""
    step = STEPS[name](folder, tokens)
    pipe.send("ready")
    while pipe.recv():
        seconds = []
        for _ in range(STEPS_OF_A_TURN):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        pipe.send((loss, seconds))


def trained_tokens(quickstart: Path) -> torch.Tensor:
    """Tokens that the quickstart trains on."""
    from moexpand.data.loader import PackedData

    (batch,) = PackedData(quickstart / "shards", LENGTH, SEQUENCES, seed=1).batch(0, micro_batch=SEQUENCES)
    return torch.from_numpy(batch.tokens).long().view(SEQUENCES, LENGTH)


def ratio(seconds: dict[str, list[float]]) -> float:
    """How many times as many tokens a second our engine's steps process."""
    return statistics.median(seconds["transformers"]) / statistics.median(seconds["moexpand"])


def main(turns: int, quickstart: Path | None) -> None:
    """Measure and print."""
    import megatron.core
    import transformers

    torch.manual_seed(0)
    tokens = trained_tokens(quickstart) if quickstart else torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
    pipes: dict[str, Connection] = {}
    processes = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        parent = quickstart / "parent" if quickstart else Path(scratch)
        if not quickstart:
            write_parent(parent)
        for name in STEPS:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(name, parent, tokens, theirs), daemon=True))
            processes[-1].start()
            pipes[name].recv()
    first: dict[str, list[float]] = {name: [] for name in STEPS}
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    losses: dict[str, float] = {}
    for number in range(turns + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            loss, took = pipe.recv()
            losses.setdefault(name, loss)
            if number >= 1:  # after a turn that warms up
                first[name].append(took[0])
                seconds[name] += took[1:]
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    print(f"loss after {STEPS_OF_A_TURN} steps: {', '.join(f'{name} {loss:.6f}' for name, loss in losses.items())}")
    for name, measured in seconds.items():
        median, spread = statistics.median(measured), f"{min(measured):.3f} to {max(measured):.3f}"
        print(f"{name:12s} {tokens.numel() / median:8,.0f} tokens/s   median {median:.3f} s, {spread}")
    print(f"ratio {ratio(seconds):.2f}x, of the first steps of turns {ratio(first):.2f}x; {turns} turns each")
    versions = f"transformers {transformers.__version__}, megatron-core {megatron.core.__version__}"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {versions}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
