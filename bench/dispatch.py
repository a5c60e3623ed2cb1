"""Absolute balance: rows that every rank computes, and the dispatcher's peak memory, on inputs made to upset a router.

Four gloo ranks with expert parallelism 4, one layer of 512 experts, 8 visited by a token. Grouped routing in 8 groups with our
`grouped_allgather` stands beside plain top-8 with Megatron-Core's `alltoall` and `allgather`. Inputs: random tokens; tokens that
are all alike; random tokens with a router that has collapsed, so that all choose the same experts. The experts themselves are
left out (a stand-in hands their input on), so that memory is the dispatcher's and the router's: the largest sum of living tensors
in forward and backward pass, as torch's profiler saw them.

`python bench/dispatch.py [picture.png]` prints the figures and draws them.
"""

import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore")
RANKS, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 512, 8, 256, 1024
INPUTS = ("random tokens", "all tokens alike", "router collapsed")
SETUPS = {
    "grouped, grouped_allgather": (8, "grouped_allgather"),
    "plain top-8, alltoall": (1, "alltoall"),
    "plain top-8, allgather": (1, "allgather"),
}


def peak_bytes(run: Any) -> int:
    """Largest sum of living CPU tensors that `run` allocates, from the allocations that the profiler recorded."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    memory = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    living = peak = 0
    for _, size in memory:
        living += size
        peak = max(peak, living)
    return peak


def measure(groups: int, dispatcher: str) -> dict[str, tuple[int, int]]:
    """Rows of this rank and peak bytes, by input."""
    from moexpand.parallel import ranks
    from moexpand.parallel.model import build_stages
    from moexpand.parallel.shape import Layout, ModelShape, RouterRules

    shape = ModelShape(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=8, router_n_groups=groups,
    )  # fmt: skip
    layout = Layout(expert=RANKS, dispatcher=dispatcher)
    here = ranks.start(layout, timeout_seconds=120)
    layer: Any = build_stages(shape, layout, RouterRules(gradient="ste"), torch.float32)[0].decoder.layers[0].mlp.train()
    rows: list[int] = []

    def hand_on(x: torch.Tensor, weights: torch.Tensor, order: Any) -> torch.Tensor:
        rows.append(weights.numel())
        return x * 1.0

    layer.experts.forward = hand_on
    layer.experts.rows_of = layer.experts.rows_given = lambda choice: None
    ordinary = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    collapsed = ordinary.clone()
    collapsed[:, 0] = -torch.arange(EXPERTS).float()
    x_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1 + here.world_rank))
    x_TH[:, 0] = 100.0
    inputs = {
        "random tokens": (ordinary.index_fill(1, torch.tensor([0]), 0.0), x_TH),
        "all tokens alike": (ordinary, torch.ones_like(x_TH)),
        "router collapsed": (collapsed, x_TH),
    }
    found = {}
    for name, (weight, tokens) in inputs.items():
        layer.router.weight.data.copy_(weight)

        def step(tokens: torch.Tensor = tokens) -> None:
            leaf = tokens[:, None].clone().requires_grad_()
            layer(leaf, padding_mask=torch.arange(TOKENS)[None] * 2)[0].sum().backward()
            layer.router.weight.grad = None

        step()
        rows.clear()
        found[name] = (peak_bytes(step), rows[0])
    ranks.stop()
    return {name: (count, peak) for name, (peak, count) in found.items()}


def worker(rank: int, port: int, groups: int, dispatcher: str, answers: Any) -> None:
    """One rank."""
    place = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    answers.put((rank, measure(groups, dispatcher)))


def on_ranks(groups: int, dispatcher: str) -> list[dict[str, tuple[int, int]]]:
    """What every rank measured."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=worker, args=(rank, port, groups, dispatcher, answers)) for rank in range(RANKS)]
    for each in workers:
        each.start()
    found = dict(answers.get(timeout=300) for _ in workers)
    for each in workers:
        each.join(30)
    return [found[rank] for rank in range(RANKS)]


def draw(found: dict[str, list[dict[str, tuple[int, int]]]], picture: Path) -> None:
    """Rows of the ranks above, peak memory of the ranks below, a column for each input."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours, width = ("#0072b2", "#d55e00", "#b8860b"), 0.27
    figure, axes = pyplot.subplots(2, len(INPUTS), figsize=(10, 5.2), sharey="row", sharex=True, layout="constrained")
    for column, name in enumerate(INPUTS):
        for number, (setup, by_rank) in enumerate(found.items()):
            places = [rank + (number - 1) * width for rank in range(RANKS)]
            axes[0, column].bar(places, [each[name][0] for each in by_rank], width, color=colours[number], label=setup)
            axes[1, column].bar(places, [each[name][1] / 2**20 for each in by_rank], width, color=colours[number])
        axes[0, column].axhline(TOKENS * TOP_K, color="#555555", linewidth=0.8, linestyle=":")
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_xlabel("rank")
        axes[1, column].set_xticks(range(RANKS))
    axes[0, 0].set_ylabel("rows that the rank computes")
    axes[1, 0].set_ylabel("peak memory, MiB")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        each.set_axisbelow(True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture)


def main(picture: Path) -> None:
    """Measure, print, draw, and fail where balance is not absolute."""
    import megatron.core

    found = {setup: on_ranks(*how) for setup, how in SETUPS.items()}
    for setup, by_rank in found.items():
        print(f"{setup}:")
        for name in INPUTS:
            rows, peaks = zip(*(each[name] for each in by_rank), strict=True)
            deviation = torch.tensor(rows, dtype=torch.float64).std(correction=0) / (sum(rows) / RANKS)
            print(
                f"  {name:18s} rows {' '.join(f'{count:6d}' for count in rows)}   deviation / mean {deviation:.3f}   "
                f"peak MiB {' '.join(f'{peak / 2**20:6.1f}' for peak in peaks)}"
            )
    grouped = found["grouped, grouped_allgather"]
    assert {each[name][0] for each in grouped for name in INPUTS} == {TOKENS * RANKS * TOP_K // RANKS}, "rows differ"
    assert len({each[name][1] for each in grouped for name in INPUTS}) == 1, "memory depends on the routing"
    draw(found, picture)
    print(f"{RANKS} gloo ranks, {TOKENS} tokens each, torch {torch.__version__}, megatron-core {megatron.core.__version__}")
    print(f"drawn in {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dispatch.png"))
