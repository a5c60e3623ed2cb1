"""The head's loss and the packed attention against torch's own functions in float64, also where ranks share the work."""

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from moexpand.parallel import context, head, ranks
from moexpand.parallel.attention import PackedAttention
from moexpand.parallel.batch import Stream
from moexpand.parallel.rotary import RotaryTables
from moexpand.parallel.shape import Layout
from tests.parallel.runs import relative
from tests.processes import run_on_ranks

VOCABULARY, WIDTH, TOKENS = 44, 12, 50
HEADS, KV_HEADS, HEAD_DIM, STREAM = 6, 2, 8, 32
ALONE: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}

Arrays = dict[str, np.ndarray]


def _numbers(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.double().numpy(force=True)


def head_case(seed: int = 0, scale: float = 1.0, masked: str = "some") -> dict[str, torch.Tensor]:
    """Hidden states, head, labels and mask, in numbers that bf16 holds."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().double()

    mask = torch.rand(TOKENS, generator=random) < {"none": 1.0, "some": 0.6, "all": 0.0}[masked]
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=random)
    return {"hidden": draw(TOKENS, WIDTH) * scale, "weight": draw(VOCABULARY, WIDTH), "labels": labels, "mask": mask.float()}


def cross_entropy(case: dict[str, torch.Tensor], factor: float) -> Arrays:
    """torch's loss in float64 of all logits at once, and its gradients times `factor`."""
    hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), case["labels"], reduction="none")
    loss = (losses * case["mask"].double()).sum()
    (factor * loss).backward()
    return {"loss": loss.numpy(force=True), "hidden": _numbers(hidden.grad), "weight": _numbers(weight.grad)}


def our_loss(case: dict[str, torch.Tensor], dtype: torch.dtype, factor: float, group: Any = ALONE) -> Arrays:
    """The head's loss and this rank's gradients; `weight` of the case is this rank's part."""
    hidden, weight = (case[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight"))
    loss = head.head_loss(hidden, weight, case["labels"], case["mask"], group)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    (factor * loss).backward()
    return {"loss": loss.numpy(force=True), "hidden": _numbers(hidden.grad), "weight": _numbers(weight.grad)}


@pytest.mark.parametrize("masked", ["some", "none", "all"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("chunk", [16, 48, 1024])
def test_the_loss_and_both_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: str, chunk: int
) -> None:
    """In four chunks, in two of which the last is short, and in one; times a factor of the backward pass."""
    monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * VOCABULARY * chunk)
    assert head.chunk_tokens(VOCABULARY, torch.device("cpu")) == chunk
    case = head_case(masked=masked)
    found, due = our_loss(case, dtype, 0.5), cross_entropy(case, 0.5)
    for name, values in due.items():
        assert relative(found[name], values) <= BOUNDS[dtype], name
    masked_out = case["mask"].numpy() == 0
    assert not found["hidden"][masked_out].any()
    assert due["hidden"].any() == (masked != "all")
    with torch.no_grad():
        unlearning = head.head_loss(case["hidden"].to(dtype), case["weight"].to(dtype), case["labels"], case["mask"], ALONE)
    assert unlearning.numpy() == found["loss"]


def test_logits_of_thousands_neither_overflow_nor_lose_the_loss() -> None:
    case = head_case(scale=2000.0)
    found, due = our_loss(case, torch.float32, 1.0), cross_entropy(case, 1.0)
    assert due["loss"] > 1e5
    for name, values in due.items():
        assert relative(found[name], values) <= 1e-6, name


def split_heads(cases: list[tuple[dict[str, torch.Tensor], torch.dtype]]) -> list[Arrays]:
    """Each case on half of the vocabulary, in chunks of 16 tokens."""
    ranks.start(Layout(tensor=2), timeout_seconds=120)
    group, rows = parallel_state.get_tensor_model_parallel_group(), VOCABULARY // 2
    head.CPU_CHUNK_BYTES = 4 * rows * 16
    own = slice(group.rank() * rows, (group.rank() + 1) * rows)
    found = [our_loss(case | {"weight": case["weight"][own].clone()}, dtype, 3.0, group) for case, dtype in cases]
    ranks.stop()
    return found


def test_a_vocabulary_on_two_ranks_gives_the_same() -> None:
    """Each rank has the whole loss, its rows' gradient, and a share of the hidden states'; labels on both ranks or on one."""
    first, last = head_case(1), head_case(2, scale=300.0)
    first["labels"] %= VOCABULARY // 2
    last["labels"] = VOCABULARY - 1 - last["labels"] % (VOCABULARY // 2)
    cases = [(case, dtype) for case in (head_case(), first, last) for dtype in BOUNDS]
    for (case, dtype), *shares in zip(cases, *run_on_ranks(split_heads, 2, cases), strict=True):
        due = cross_entropy(case, 3.0)
        assert shares[0]["loss"] == shares[1]["loss"]
        assert relative(shares[0]["loss"], due["loss"]) <= BOUNDS[dtype]
        assert relative(np.concatenate([share["weight"] for share in shares]), due["weight"]) <= BOUNDS[dtype]
        assert relative(shares[0]["hidden"] + shares[1]["hidden"], due["hidden"]) <= BOUNDS[dtype]


LENGTHS = {
    "mixed": [1, 9, 1, 5, 9, 1, 2, 4],
    "one": [32],
    "ones": [1] * 32,
    "equal": [8] * 4,
    "with an empty one": [7, 0, 7, 0, 18],
    "two": [31, 1],
}


def attention_case(seed: int, lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value and the gradient of the output, each [T, heads, D], and where segments begin."""
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(STREAM, heads, HEAD_DIM, generator=random).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return tensors, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def by_segments(tensors: list[torch.Tensor], bounds: torch.Tensor, scale: float | None) -> list[np.ndarray]:
    """Output and gradients of query, key and value by torch's attention in float64, segment after segment, keys repeated."""
    query, key, value = (each.to(torch.float64, copy=True).requires_grad_() for each in tensors[:3])
    outputs = []
    for start, stop in pairwise(bounds.tolist()):
        q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (k, v))
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1))
    output = torch.cat(outputs)
    output.backward(tensors[3].double())
    return [_numbers(each) for each in (output, query.grad, key.grad, value.grad)]


def ours(tensors: list[torch.Tensor], bounds: torch.Tensor, scale: float | None) -> list[np.ndarray]:
    """This rank's part of the same by the packed attention: outputs of its tokens, gradients at them and zero elsewhere."""
    config: Any = None
    attention = PackedAttention(config, softmax_scale=scale)
    leaves = [each.clone().requires_grad_() for each in tensors[:3]]
    parts = [context.split(each)[:, None] for each in leaves]
    unturned = RotaryTables(*(parts[0].new_full((len(parts[0]), 1, HEAD_DIM), value).detach() for value in (1.0, 0.0)))
    output = attention(*parts, None, packed_seq_params=Stream(cu_seqlens_q=bounds, rotary=unturned))
    assert output.shape == (len(parts[0]), 1, HEADS * HEAD_DIM)
    output.backward(context.split(tensors[3]).reshape(output.shape))
    whole = context.gather(output.detach()).view(STREAM, HEADS, HEAD_DIM)
    return [_numbers(each) for each in (whole, *(leaf.grad for leaf in leaves))]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    ranks.start(Layout())
    yield
    ranks.stop()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", list(LENGTHS))
def test_packed_attention_is_torchs_of_every_segment(alone: None, name: str, scale: float | None, dtype: torch.dtype) -> None:
    tensors, bounds = attention_case(3, LENGTHS[name], dtype)
    found, due = ours(tensors, bounds, scale), by_segments(tensors, bounds, scale)
    for one, other in zip(found, due, strict=True):
        assert np.abs(one - other).max() <= (1e-13 if dtype == torch.float64 else 1e-5)


CASES = [*LENGTHS.values(), *([border, STREAM - border] for border in range(1, STREAM))]
for _seed in range(18):
    _borders = np.random.default_rng(_seed).choice(np.arange(1, STREAM), _seed % 9 + 1, replace=False)
    CASES.append(np.diff([0, *sorted(_borders), STREAM]).tolist())


def shared_attention() -> list[list[np.ndarray]]:
    """Every case on context-parallel ranks."""
    here = ranks.start(Layout(context=2), timeout_seconds=120)
    own = context.split(torch.arange(STREAM))
    assert own.tolist() == ([*range(8), *range(24, 32)] if here.world_rank == 0 else [*range(8, 24)])
    assert torch.equal(context.gather(own), torch.arange(STREAM))
    found = [ours(*attention_case(number, lengths), None) for number, lengths in enumerate(CASES)]
    ranks.stop()
    return found


def test_two_context_parallel_ranks_compute_what_one_does(alone: None) -> None:
    """With borders of segments at every place of the stream; gradients are the sum of both ranks' parts."""
    answers = run_on_ranks(shared_attention, 2)
    for number, lengths in enumerate(CASES):
        due = ours(*attention_case(number, lengths), None)
        first, second = (answer[number] for answer in answers)
        assert np.array_equal(first[0], second[0])
        found = [first[0], *(one + other for one, other in zip(first[1:], second[1:], strict=True))]
        for one, other in zip(found, due, strict=True):
            assert np.abs(one - other).max() <= BOUNDS[torch.float64], lengths


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_ranks_share_the_stream_and_its_cost_evenly(size: int) -> None:
    held = [[place for chunk in context.own_chunks(48, size, rank) for place in chunk] for rank in range(size)]
    assert sorted(place for own in held for place in own) == list(range(48))
    assert len({sum(place + 1 for place in own) for own in held}) == 1, "scores of a causal stream"
