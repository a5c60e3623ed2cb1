"""What a GPU sends in a step, by purpose, and whether it leaves the node. Arithmetic alone.

Ranks are numbered as Megatron-Core numbers them: tensor-parallel ranks are neighbours, then context-, then data-parallel ones,
and pipeline stages lie furthest apart; for the experts, expert-tensor ranks, then expert-parallel ones.
"""

from dataclasses import dataclass

from moexpand.conf.train_schema import Parallel
from moexpand.train.plan_memory import GRADIENT, Work, parameters, replicas_of, rows_of_rank, stages, tokens_of_rank

NODE, NETWORK = "node", "network"


@dataclass(frozen=True)
class Traffic:
    """One purpose: bytes that a GPU sends in a step, and the link that they take (`node` or `network`)."""

    purpose: str
    nbytes: int
    link: str


def traffic(work: Work, parallel: Parallel, world: int, gpus_per_node: int) -> list[Traffic]:
    """What the busiest rank sends, by purpose; purposes for which nothing is sent are left out."""
    arch, size = work.architecture, work.width
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    stage = max(stages(arch.num_hidden_layers, parallel), key=lambda each: each.layers)
    held = parameters(work, parallel, stage)
    replicas, micro_batches = replicas_of(work, parallel, world)
    expert_replicas = world // (parallel.expert * parallel.expert_tensor * pipeline)
    hidden = tokens_of_rank(work, parallel) * arch.hidden_size * size
    passes = micro_batches * stage.layers
    ends = micro_batches * 2 * (stage.first + stage.last)  # the embedding's output and the head's input, both ways
    sides = min(2, pipeline - 1)  # a stage in the middle sends onwards and back
    again = 1 if parallel.recompute == "full" else 0

    def over(ranks: int) -> float:
        """Share of a tensor that a ring of so many ranks makes each of them send."""
        return (ranks - 1) / ranks

    def link(ranks: int, apart: int) -> str:
        return NODE if ranks * apart <= gpus_per_node else NETWORK

    found = [
        # Gradients are reduced, then the updated weights gathered.
        Traffic(
            "gradients and weights",
            int(held.dense * (GRADIENT + size) * over(replicas * context)),
            link(replicas * context, tensor),
        ),
        Traffic(
            "gradients and weights of the experts",
            int(held.experts * (GRADIENT + size) * over(expert_replicas)),
            link(expert_replicas, parallel.expert * parallel.expert_tensor),
        ),
        # Forward: gather before queries, keys and values, scatter behind the projection; backward: both, and the gather again.
        Traffic("tensor parallelism", int((passes * (5 + 2 * again) + ends) * hidden * over(tensor)), link(tensor, 1)),
        Traffic(
            "tokens to experts and back",
            _dispatch(work, parallel, passes, again),
            link(parallel.expert * parallel.expert_tensor, 1),
        ),
        Traffic(
            "keys and values of the context",
            int(passes * (2 + again) * _keys_and_values(work, parallel) * (context - 1)),
            link(context, tensor),
        ),
        Traffic(
            "pipeline",
            sides * micro_batches * parallel.interleave * hidden // tensor,
            link(pipeline, world // pipeline),
        ),
    ]
    return [each for each in found if each.nbytes]


def _keys_and_values(work: Work, parallel: Parallel) -> int:
    arch = work.architecture
    heads = arch.num_key_value_heads // parallel.tensor
    return 2 * tokens_of_rank(work, parallel) * heads * arch.head_dim * work.width


def _dispatch(work: Work, parallel: Parallel, passes: int, again: int) -> int:
    """Hidden states to the experts and back, in the forward pass and, their gradients, in the backward pass."""
    arch, shared = work.architecture, parallel.expert * parallel.expert_tensor
    if shared == 1:
        return 0
    if parallel.recompute == "selective":
        again = 1
    if parallel.dispatcher == "alltoall":  # copies of tokens, to the ranks of their experts
        leaving = rows_of_rank(work, parallel) * (shared - 1) / shared
    else:  # every token to every rank; for plain allgather as for that of groups
        leaving = tokens_of_rank(work, parallel) // parallel.tensor * (shared - 1)
    return int(passes * (4 + 2 * again) * leaving * arch.hidden_size * work.width)
