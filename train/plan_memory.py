"""What a GPU holds under a layout: weights, gradients, optimiser states, activations, buffers. Arithmetic alone, without torch.

Every figure follows from the engine's own code (parallel/): which tensors the backward pass of each module keeps, how the
distributed optimiser splits its states. `tests/train/test_plan_memory.py` holds it against engines that were built and run.

Legend: T tokens of a micro-batch on a context-parallel rank, H hidden, N query heads, M key/value heads, D head width, E experts,
K chosen, I width of an expert, V vocabulary, b bytes of a weight.
"""

from dataclasses import dataclass

from moexpand.conf.train_schema import Parallel
from moexpand.upcycle.architecture import Architecture

GRADIENT = 4
"""Bytes: gradients are added up in fp32."""

INDEX = 8
"""Bytes of an index of torch."""

CHUNK = 2**29
"""Bytes of the head's logits at a time, as parallel/head.py has it on a GPU."""

PARTS = ("weights", "gradients", "optimiser", "activations", "dispatch", "working")
"""Of a GPU's memory. `dispatch` is what the dispatcher keeps of other ranks' tokens; `working` what a layer's backward pass, or
the head, needs while it runs."""


@dataclass(frozen=True)
class Work:
    """What is computed: the model and how much of it at a time.

    Attributes:
        architecture: of the decoder.
        towers: parameters of towers (pictures, series), whole on each rank of the first stage.
        precision: `fp32` or `bf16`.
        seq_length, micro_batch, global_batch: of the packed sequences.
        imbalance: rows of the busiest rank over the mean, where tokens go where the router sends them.
        pictures: share of the tokens that hold places of pictures.
    """

    architecture: Architecture
    towers: int
    precision: str
    seq_length: int
    micro_batch: int
    global_batch: int
    imbalance: float = 1.0
    pictures: float = 0.0

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Stage:
    """A pipeline rank: how many layers, and what else."""

    layers: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank of a stage: those that all data-parallel ranks hold, and those of the experts."""

    dense: int
    experts: int


def stages(layers: int, parallel: Parallel) -> list[Stage]:
    """The pipeline ranks of a layout."""
    size, first, last = parallel.pipeline, parallel.first_layers, parallel.last_layers
    if size == 1:
        return [Stage(layers, True, True)]
    between = size - bool(first) - bool(last)
    each = (layers - first - last) // between if between else 0
    counts = [first or each, *[each] * (size - 2), last or each]
    return [Stage(count, number == 0, number == size - 1) for number, count in enumerate(counts)]


def parameters(work: Work, parallel: Parallel, stage: Stage) -> Parameters:
    """Parameters of one rank. Tensor parallelism splits matrices and the vocabulary, and neither norms, routers nor towers."""
    arch, split = work.architecture, parallel.tensor
    hidden, width = arch.hidden_size, arch.head_dim
    attention = hidden * (2 * arch.num_attention_heads + 2 * arch.num_key_value_heads) * width // split
    layer = attention + 2 * hidden + 2 * width + arch.num_experts * hidden
    table = arch.vocab_size * hidden // split
    dense = stage.layers * layer
    if stage.first:
        dense += table + work.towers
    if stage.last:
        dense += hidden + (0 if arch.tie_word_embeddings and stage.first else table)
    expert = 3 * hidden * arch.moe_intermediate_size
    return Parameters(dense, stage.layers * arch.num_experts * expert // (parallel.expert * parallel.expert_tensor))


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by part."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    dispatch: int
    working: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


def memory(work: Work, parallel: Parallel, world: int) -> Memory:
    """The memory of the fullest GPU at the fullest moment of a step."""
    own = stages(work.architecture.num_hidden_layers, parallel)
    found = [_memory(work, parallel, world, stage, number) for number, stage in enumerate(own)]
    return max(found, key=lambda each: each.total)


def _memory(work: Work, parallel: Parallel, world: int, stage: Stage, number: int) -> Memory:
    held = parameters(work, parallel, stage)
    replicas = world // (parallel.tensor * parallel.pipeline)
    expert_replicas = world // (parallel.expert * parallel.expert_tensor * parallel.pipeline)
    state = 12 if work.precision == "bf16" else 8  # master weight and two moments in fp32; fp32 weights are their own masters
    count = held.dense + held.experts
    kept, dispatched = layer_activations(work, parallel)
    in_flight = micro_batches_in_flight(work, parallel, world, number)
    # The head's part is over, but for its gradients, when the backward pass of the layers begins.
    head = _head_kept(work, parallel) + _head_working(work, parallel) if stage.last else 0
    return Memory(
        weights=count * work.width,
        gradients=count * GRADIENT,
        optimiser=state * held.dense // replicas + state * held.experts // expert_replicas,
        activations=in_flight * (stage.layers * kept + (_tower_kept(work, parallel) if stage.first else 0)),
        dispatch=in_flight * stage.layers * dispatched,
        working=max(_layer_working(work, parallel), head),
    )


def replicas_of(work: Work, parallel: Parallel, world: int) -> tuple[int, int]:
    """Data-parallel ranks, and micro-batches of each in a step."""
    replicas = world // (parallel.tensor * parallel.context * parallel.pipeline)
    return replicas, max(1, work.global_batch // (work.micro_batch * replicas))


def micro_batches_in_flight(work: Work, parallel: Parallel, world: int, number: int) -> int:
    """Micro-batches whose activations a pipeline rank holds at once under the schedule one-forward-one-backward.

    With a rank's stage in parts (interleaved) it holds up to a stage's worth more for the warm-up of the further parts.
    """
    _, count = replicas_of(work, parallel, world)
    ahead = parallel.pipeline - number
    if parallel.interleave > 1:
        warm_up = (parallel.pipeline - number - 1) * 2 + (parallel.interleave - 1) * parallel.pipeline + 1
        ahead = -(-warm_up // parallel.interleave)
    return min(count, ahead)


def tokens_of_rank(work: Work, parallel: Parallel) -> int:
    """T: tokens of a micro-batch on one context-parallel rank."""
    return work.micro_batch * work.seq_length // parallel.context


def layer_activations(work: Work, parallel: Parallel) -> tuple[int, int]:
    """Bytes that a layer keeps of a micro-batch for its backward pass: of this rank's tokens, and of what was dispatched here."""
    attention, mixture, dispatched = _attention_kept(work, parallel), *_mixture_kept(work, parallel)
    tokens, split = tokens_of_rank(work, parallel), parallel.tensor
    residual = tokens * work.architecture.hidden_size * work.width // split
    if parallel.recompute == "full":
        return residual, 0
    if parallel.recompute == "selective":  # what goes into the core attention and into the mixture
        return _attention_inputs(work, parallel) + _norms_kept(work, parallel), 0
    return attention + mixture, dispatched


def _norms_kept(work: Work, parallel: Parallel) -> int:
    """Both norms of a layer: input in fp32, its scale, the normal and the output."""
    arch, tokens = work.architecture, tokens_of_rank(work, parallel)
    hidden = 2 * (4 + 2 * work.width) if work.precision == "bf16" else 2 * 3 * 4
    return tokens * (hidden * arch.hidden_size + 2 * 4) // parallel.tensor


def _attention_inputs(work: Work, parallel: Parallel) -> int:
    """Queries and keys before and behind their norms and turns, values, and what goes into the output projection."""
    arch, tokens = work.architecture, tokens_of_rank(work, parallel)
    query, key = (10, 10) if work.precision == "bf16" else (20, 20)
    heads = arch.num_attention_heads * (query * arch.head_dim + 4) + arch.num_key_value_heads * (key * arch.head_dim + 4)
    return tokens * heads // parallel.tensor


def _attention_kept(work: Work, parallel: Parallel) -> int:
    """Attention with its norms: its inputs, the core's output, each head's logsumexp; keys and values of the other ranks."""
    arch, tokens, wide = work.architecture, tokens_of_rank(work, parallel), work.width
    core = tokens * arch.num_attention_heads * (wide * arch.head_dim + 4) // parallel.tensor
    gathered = 0
    if parallel.context > 1:
        gathered = 2 * tokens * parallel.context * arch.num_key_value_heads * arch.head_dim * wide // parallel.tensor
    return _norms_kept(work, parallel) + _attention_inputs(work, parallel) + core + gathered


def _mixture_kept(work: Work, parallel: Parallel) -> tuple[int, int]:
    """Router, dispatcher and experts."""
    arch, wide = work.architecture, work.width
    tokens = tokens_of_rank(work, parallel) // parallel.tensor
    top_k, inner = arch.num_experts_per_tok, arch.moe_intermediate_size
    copies = (tokens * 4 + arch.num_experts * 4) * arch.hidden_size if work.precision == "bf16" else 0
    router = copies + tokens * (2 * 4 * arch.num_experts + top_k * (4 + INDEX))
    rows = rows_of_rank(work, parallel)
    experts = rows * (2 * wide * inner // parallel.expert_tensor + 4 + 2 * INDEX)
    shared = parallel.expert * parallel.expert_tensor
    if shared == 1:
        return router + experts, 0
    received = tokens * shared if parallel.dispatcher == "grouped_allgather" else rows
    return router + experts, received * arch.hidden_size * wide


def rows_of_rank(work: Work, parallel: Parallel) -> int:
    """Token copies that a rank's experts compute for one micro-batch of everyone."""
    tokens = tokens_of_rank(work, parallel) // parallel.tensor
    return int(tokens * work.architecture.num_experts_per_tok * parallel.expert_tensor * work.imbalance)


def _layer_working(work: Work, parallel: Parallel) -> int:
    """The experts' backward pass: gathered rows and their gradients, and the gradients of a layer's weights, not yet added up.

    A layer that is computed again has its activations besides.
    """
    arch, wide, rows = work.architecture, work.width, rows_of_rank(work, parallel)
    inner = arch.moe_intermediate_size // parallel.expert_tensor
    weights = 3 * arch.num_experts // parallel.expert * arch.hidden_size * inner * wide
    passing = rows * wide * (3 * arch.hidden_size + 5 * inner) + _travelling(work, parallel)
    if parallel.recompute == "none":
        return weights + passing
    whole = Parallel(**{**vars(parallel), "recompute": "none"})
    again = sum(layer_activations(work, whole)) - (
        layer_activations(work, parallel)[0] if parallel.recompute == "selective" else 0
    )
    return weights + passing + again


def _tower_kept(work: Work, parallel: Parallel) -> int:
    """What a vision tower keeps of a micro-batch's pictures, which are shared out over the tensor- and context-parallel ranks.

    Of each patch and block: inputs and outputs of both norms, queries, keys, values, the core's output twice, and the inner layer
    before and behind its activation.
    """
    tower, wide = work.architecture.vision, work.width
    if tower is None:
        return 0
    tokens = work.pictures * work.micro_batch * work.seq_length / (parallel.context * parallel.tensor)
    patches = int(tokens * tower.spatial_merge_size**2)
    block = 9 * wide * tower.hidden_size + 2 * wide * tower.intermediate_size
    if parallel.recompute == "full":
        block = wide * tower.hidden_size
    mergers = 3 * (1 + len(tower.deepstack_visual_indexes)) + 4
    return patches * (tower.depth * block + mergers * wide * tower.hidden_size)


def _travelling(work: Work, parallel: Parallel) -> int:
    """Rows on their way to and from other ranks: as they are sent and as they arrive."""
    shared = parallel.expert * parallel.expert_tensor
    if shared == 1:
        return 0
    tokens = tokens_of_rank(work, parallel) // parallel.tensor
    rows = tokens * shared if parallel.dispatcher == "grouped_allgather" else rows_of_rank(work, parallel)
    return 2 * rows * work.architecture.hidden_size * work.width


def _head_kept(work: Work, parallel: Parallel) -> int:
    """The last norm, and the gradients of hidden states and head, which are made beside the loss."""
    arch, tokens = work.architecture, tokens_of_rank(work, parallel)
    norm = _norms_kept(work, parallel) // 2
    table = arch.vocab_size * arch.hidden_size // parallel.tensor
    return norm + tokens * arch.hidden_size * work.width + table * work.width


def _head_working(work: Work, parallel: Parallel) -> int:
    """The head's gradient in fp32, and a chunk of logits: as they are computed, in fp32, and their gradient."""
    arch = work.architecture
    rows = arch.vocab_size // parallel.tensor
    tokens = min(tokens_of_rank(work, parallel), max(16, CHUNK // (4 * rows)))
    wide = 4 * arch.hidden_size * rows if work.precision == "bf16" else 0
    return wide + tokens * rows * ((2 * work.width + 4) if work.precision == "bf16" else 4)
