"""Layouts of a model on a cluster: which there are, which are refused and why, which fit, and in what order to try them.

The order is by a time that is counted with nominal rates: multiplications at the GPU's peak times `EFFICIENCY`, bytes at the
links' rates, nothing overlapped, and the pipeline's bubble. It is there to compare layouts; it predicts no throughput.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from moexpand.base.errors import InputError
from moexpand.conf.check import check_batch, check_layout
from moexpand.conf.train_schema import Parallel, Train
from moexpand.train.plan_memory import Memory, Work, memory, replicas_of
from moexpand.train.plan_traffic import NODE, Traffic, traffic

GIB = 2**30
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Gpu:
    """By data sheets: bytes that torch sees, multiply-adds a second in bf16 times two, bytes a second inside the node."""

    nbytes: int
    flops: float
    node_rate: float


GPUS = {
    "a100-40": Gpu(int(39.4 * GIB), 312e12, 300e9),
    "a100": Gpu(int(79.2 * GIB), 312e12, 300e9),
    "h100": Gpu(int(79.1 * GIB), 989e12, 450e9),
    "h200": Gpu(int(139.8 * GIB), 989e12, 450e9),
    "b200": Gpu(int(178.3 * GIB), 2250e12, 900e9),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes with GPUs of one kind, and bytes a second that each GPU sends over the network."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_rate: float

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Candidate:
    """A layout that the engine computes.

    Attributes:
        seconds: of a step, by nominal rates; to compare with.
    """

    parallel: Parallel
    memory: Memory
    traffic: list[Traffic]
    seconds: float

    def sent(self, link: str) -> int:
        """Bytes that a GPU sends over a link in a step."""
        return sum(each.nbytes for each in self.traffic if each.link == link)


@dataclass(frozen=True)
class Refusal:
    """A layout that the engine, or the batch, refuses, and the sentence."""

    parallel: Parallel
    why: str


def gpu_of(name: str) -> Gpu:
    """A GPU by its name, or by its memory in GiB with an H100's rates.

    Raises:
        InputError: neither.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    try:
        size = float(name)
    except ValueError:
        size = 0.0
    if size <= 0:
        raise InputError(f"gpu={name} is neither one of {', '.join(GPUS)} nor a number of GiB such as gpu=96.")
    return replace(GPUS["h100"], nbytes=int(size * GIB))


def examine(work: Work, cluster: Cluster, wanted: Parallel) -> tuple[list[Candidate], list[Refusal]]:
    """All layouts that keep to what `wanted` sets: those that are computed, the quickest first, and those that are refused."""
    found: list[Candidate] = []
    refused: list[Refusal] = []
    train = Train(global_batch=work.global_batch, micro_batch=work.micro_batch, seq_length=work.seq_length)
    for parallel in layouts(work, cluster, wanted):
        try:
            check_layout(parallel, work.architecture, work.precision, cluster.world, "nodes*gpus_per_node")
            check_batch(train, parallel, cluster.world)
        except InputError as error:
            refused.append(Refusal(parallel, str(error)))
            continue
        even = parallel.expert == 1 or parallel.dispatcher == "grouped_allgather"  # whatever the router says
        own = replace(work, imbalance=1.0) if even else work
        sent = traffic(own, parallel, cluster.world, cluster.gpus_per_node)
        held = memory(own, parallel, cluster.world)
        found.append(Candidate(parallel, held, sent, seconds(own, parallel, cluster, sent)))
    return sorted(found, key=lambda each: (each.seconds, each.memory.total)), refused


def layouts(work: Work, cluster: Cluster, wanted: Parallel) -> Iterator[Parallel]:
    """Layouts to look at: powers of two inside a node for TP, over nodes for EP, stages as even as they can be."""
    arch, usual = work.architecture, Parallel()

    def sizes(key: str, values: list[int]) -> list[int]:
        given = getattr(wanted, key)
        return [given] if given != getattr(usual, key) else values

    tensors = sizes("tensor", _powers(min(cluster.gpus_per_node, arch.num_key_value_heads, 8)))
    contexts = sizes("context", [size for size in _powers(8) if size == 1 or work.seq_length // size >= 8192])
    experts = sizes("expert", _powers(min(arch.num_experts, 64)))
    pipelines = sizes("pipeline", _powers(min(arch.num_hidden_layers, 64)))
    recomputes = ["none", "selective", "full"] if wanted.recompute == usual.recompute else [wanted.recompute]
    dispatchers = ["grouped_allgather", "alltoall"] if wanted.dispatcher == usual.dispatcher else [wanted.dispatcher]
    for tensor, context, pipeline, expert in product(tensors, contexts, pipelines, experts):
        if tensor * context * pipeline > cluster.world or expert * pipeline > cluster.world:
            continue
        first, last = wanted.first_layers, wanted.last_layers
        if not first and not last and wanted.interleave == 1:
            first, last = _ends(arch.num_hidden_layers, pipeline)
        for dispatcher, recompute in product(dispatchers if expert > 1 else [wanted.dispatcher], recomputes):
            if dispatcher == "grouped_allgather" and arch.router_n_groups == 1 and wanted.dispatcher != dispatcher:
                continue  # a model without groups has no choice here
            yield replace(
                wanted,
                tensor=tensor,
                context=context,
                pipeline=pipeline,
                expert=expert,
                first_layers=first,
                last_layers=last,
                dispatcher=dispatcher,
                recompute=recompute,
            )


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _ends(layers: int, stages: int) -> tuple[int, int]:
    """Layers of the first and the last stage where they cannot all be equal: 94 on 16 are 5, 14 times 6, and 5; else 0 and 0."""
    if stages < 3 or layers % stages == 0:
        return 0, 0
    rest = layers - (stages - 2) * -(-layers // stages)
    return (rest // 2, rest - rest // 2) if rest >= 2 else (0, 0)


def seconds(work: Work, parallel: Parallel, cluster: Cluster, sent: list[Traffic]) -> float:
    """A step by nominal rates."""
    _, micro_batches = replicas_of(work, parallel, cluster.world)
    again = {"none": 0.0, "selective": 0.7, "full": 1.0}[parallel.recompute]
    flops = work.global_batch * work.seq_length * flops_of_token(work) * (3 + again) / 3
    bubble = (parallel.pipeline - 1) / (micro_batches * parallel.interleave)
    computing = flops / (cluster.world * cluster.gpu.flops * EFFICIENCY) * (1 + bubble)
    moving = sum(each.nbytes / (cluster.gpu.node_rate if each.link == NODE else cluster.network_rate) for each in sent)
    return computing + moving


def flops_of_token(work: Work) -> float:
    """Multiply-adds of a token times two, forward and backward: 6 for each parameter that it uses, and the attention's scores.

    On the busiest rank, whose experts have `imbalance` times the mean. A sequence is taken to be one sample; samples that are
    packed together have fewer scores.
    """
    arch = work.architecture
    heads = arch.num_attention_heads * arch.head_dim
    attention = arch.hidden_size * 2 * (heads + arch.num_key_value_heads * arch.head_dim)
    experts = 3 * arch.num_experts_per_tok * arch.hidden_size * arch.moe_intermediate_size * work.imbalance
    layer = attention + experts + arch.num_experts * arch.hidden_size
    scores = 2 * heads * work.seq_length / 2
    return 6 * (arch.num_hidden_layers * (layer + scores) + arch.vocab_size * arch.hidden_size)
