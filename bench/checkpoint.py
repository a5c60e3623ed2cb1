"""Checkpoints on two gloo ranks (EP 2): how long training stands still, and saving and loading against torch's own.

Four things with the same state (fp32 weights, both moments) take turns: a save that is waited for, a save in the background
while training steps go on, torch.distributed.checkpoint.save of each rank's tensors as they lie, and both loads. What the
background save blocks is its begin (the plan), what the next update waits for the copy, and its end (table, agreement); steps run
between.
`python bench/checkpoint.py [rounds [folder]]`; the folder decides which disk is measured. Fails where a target is missed.
"""

import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests.processes starts the ranks

SHAPE = {
    "vocab_size": 8448, "hidden_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 80, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 128, "norm_topk_prob": True,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "router_n_groups": 1,
}  # fmt: skip
TARGETS = {"blocked": 0.10, "save": 0.9, "load": 0.9}


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each thing in each round, the slowest of the ranks."""
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed.checkpoint as dcp

    from moexpand.parallel import checkpoint, ranks
    from moexpand.parallel.batch import PackedBatch
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.optimizer import AdamSettings
    from moexpand.parallel.shape import Layout, ModelShape, RouterRules
    from moexpand.train import checkpoints

    layout = Layout(expert=2)
    here = ranks.start(layout)
    engine = Engine(ModelShape(**SHAPE), layout, RouterRules(), "fp32", here)
    generator = torch.Generator().manual_seed(0)
    engine.fill(lambda name, rows: torch.randn(_shape(engine, name), generator=generator)[rows or slice(None)] * 0.02)
    engine.prepare_training(AdamSettings())
    batch = PackedBatch.from_sequences(torch.randint(0, 8448, (2, 256), generator=generator))
    engine.step([batch], 1e-3)
    state = _tensors(engine)
    writer = checkpoint.Writer(engine)
    wait = engine.before_update
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> None:
        ranks.barrier()
        began = time.perf_counter()
        work()
        spent = max(ranks.gather(time.perf_counter() - began))
        found.setdefault(name, []).append(spent)

    def fresh(name: str) -> Path:
        place = folder / name
        if here.main:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        ranks.barrier()
        return place

    def saved(place: Path) -> None:
        writer.start(place, {"step": 1}, background=False)
        facts.update(writer.finish())

    def verified(place: Path) -> None:
        mine = list(everything)[here.world_rank :: here.world_size]
        assert all(checkpoints.fact_of(place / name) == everything[name] for name in mine)
        checkpoint.load(engine, place)

    facts: dict[str, Any] = {}
    for number in range(rounds + 1):
        if number == 1:
            found.clear()  # the first round fills buffers and caches
        place = fresh("waited_for")
        timed("save", lambda place=place: saved(place))
        everything = {name: fact for part in ranks.gather(facts) for name, fact in part.items()}
        timed("load", lambda place=place: verified(place))
        place = fresh("torch")
        timed("torch save", lambda place=place: dcp.save(state, checkpoint_id=place))
        timed("torch load", lambda place=place: dcp.load(state, checkpoint_id=place))
        timed("step", lambda: engine.step([batch], 1e-3))
        place = fresh("background")
        timed("begin", lambda place=place: writer.start(place, {"step": 1}, background=True))
        began, waits = time.perf_counter(), []
        engine.before_update = lambda waits=waits: waits.append(_seconds(wait))
        while ranks.any_rank(writer.writing)[0]:
            timed("step meanwhile", lambda: engine.step([batch], 1e-3))
        found.setdefault("wait", []).append(max(ranks.gather(sum(waits))))
        found.setdefault("background", []).append(time.perf_counter() - began)
        timed("end", writer.finish)
    found["bytes"] = [float(sum(ranks.gather(sum(tensor.nbytes for tensor in state.values()))))]
    ranks.stop()
    return found


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _shape(engine: Any, name: str) -> tuple[int, ...]:
    from moexpand.parallel import weights

    return next(
        part.shape for part in weights.parts(engine.stages, engine.shape, lambda parameter: parameter) if part.name == name
    )


def _tensors(engine: Any) -> dict[str, Any]:
    """The same tensors that our checkpoint stores of this rank, each under a name of this rank's own."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from moexpand.parallel import checkpoint, optimizer_state

    model = checkpoint._model_state(engine)
    kept = {
        f"{tensor.key}{tensor.global_offset}": tensor.data.detach()
        for part in model.values()
        for tensor in part.values()
        if isinstance(tensor, ShardedTensor) and tensor.replica_id[-1] == 0
    }
    kept |= {name: each.data for name, each in optimizer_state.sharded(engine.optimizer, model).items()}
    return {f"rank{engine.ranks.world_rank}.{name}": tensor for name, tensor in kept.items()}


def main(rounds: int, folder: Path) -> int:
    """Measure and print; returns whether a target is missed."""
    from importlib.metadata import version

    import torch

    from tests.processes import run_on_ranks

    found = run_on_ranks(measure, 2, folder, rounds, timeout=1800.0)[0]
    median = {name: statistics.median(values) for name, values in found.items()}
    spread = {name: f"{min(values):.2f} to {max(values):.2f}" for name, values in found.items()}
    size = median.pop("bytes")
    print(f"torch {torch.__version__}, megatron-core {version('megatron-core')}; {size / 1e9:.2f} GB of state, {rounds} rounds")
    for name in ("save", "torch save", "load", "torch load", "begin", "wait", "end", "background", "step", "step meanwhile"):
        print(f"  {name:<15} {median[name]:7.3f} s   ({spread[name]})")
    blocked = (median["begin"] + median["wait"] + median["end"]) / median["save"]
    save, load = median["torch save"] / median["save"], median["torch load"] / median["load"]
    print(f"blocked by a save in the background, of one that is waited for: {blocked:.3f} (target at most {TARGETS['blocked']})")
    print(f"speed of saving over torch's: {save:.2f} (target at least {TARGETS['save']}), checksums included")
    print(f"speed of loading over torch's: {load:.2f} (target at least {TARGETS['load']}), checksums verified")
    print(f"a step while files are written takes {median['step meanwhile'] / median['step']:.2f} times as long")
    return int(blocked > TARGETS["blocked"] or save < TARGETS["save"] or load < TARGETS["load"])


if __name__ == "__main__":
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as scratch:
        sys.exit(main(turns, Path(scratch)))
