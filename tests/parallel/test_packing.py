"""Samples that share a packed stream never see each other, forward or backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs
from tests.parallel.runs import Block, Micro, relative
from tests.processes import run_on_ranks

SEGMENTS = [np.random.default_rng(number).integers(0, 256, length) for number, length in enumerate((9, 1, 17, 9, 2, 26))]
MASKS = [np.random.default_rng(number).integers(0, 2, len(segment)) for number, segment in enumerate(SEGMENTS)]
for _mask in MASKS:
    _mask[-1] = 0
CHANGED = [*SEGMENTS[:2], (SEGMENTS[2] + 100) % 256, *SEGMENTS[3:]]


# fp32 rounds a token's experts differently when their other rows change; in float64 a leak has nowhere to hide.
BOUNDS = {"fp32": 1e-5, "fp64": 1e-12}


@pytest.fixture(scope="module", params=list(BOUNDS))
def engine(parent: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Grouped routing, straight-through gradient, no auxiliary losses (their scope is the micro-batch by definition)."""
    with runs.engine(parent, {}, {"gradient": "ste"}, request.param, shape={"router_n_groups": 4}) as built:
        built.bound = BOUNDS[request.param]
        yield runs.prepare(built, clip_grad=0.0, weight_decay=0.0)


def _logits(engine: Any, segments: list[np.ndarray]) -> np.ndarray:
    masks = [np.ones(len(segment)) for segment in segments]
    (found,), _ = engine.logits(runs.on_device([Micro(segments, masks)]))
    return found.numpy()


def test_logits_of_a_packed_batch_are_those_of_its_samples_alone(engine: Any) -> None:
    packed = _logits(engine, SEGMENTS)
    alone = np.concatenate([_logits(engine, [segment]) for segment in SEGMENTS])
    assert np.abs(packed - alone).max() <= engine.bound


def test_changing_one_sample_leaves_its_neighbours_logits_as_they_are(engine: Any) -> None:
    before, after = _logits(engine, SEGMENTS), _logits(engine, CHANGED)
    own = slice(10, 27)
    assert np.abs(before[own] - after[own]).max() > 0.1
    assert np.abs(np.delete(before, own, 0) - np.delete(after, own, 0)).max() <= engine.bound


def test_gradients_of_a_packed_batch_are_the_sums_over_its_samples_alone(engine: Any) -> None:
    packed, report = runs.gradients(engine, [Micro(SEGMENTS, MASKS)])
    assert report.tokens == sum(int(mask.sum()) for mask in MASKS)
    sums = {name: np.zeros_like(value, dtype=np.float64) for name, value in packed.items()}
    loss_sum, tokens = 0.0, 0
    for segment, mask in zip(SEGMENTS, MASKS, strict=True):
        alone, one = runs.gradients(engine, [Micro([segment], [mask])])
        for name, value in alone.items():  # the step divides by its own number of tokens
            sums[name] += value.astype(np.float64) * one.tokens
        loss_sum, tokens = loss_sum + one.loss * one.tokens, tokens + one.tokens
    assert tokens == report.tokens
    assert loss_sum / tokens == pytest.approx(report.loss, rel=engine.bound)
    distances = {name: relative(packed[name] * report.tokens, sums[name]) for name in packed}
    # Megatron-Core divides by the number of tokens in fp32, in float64 runs too.
    assert max(distances.values()) <= max(engine.bound, 2e-7), max(distances, key=lambda name: distances[name])
    assert np.abs(packed["model.layers.0.mlp.gate.weight"]).max() > 1e-4


def test_masked_tokens_have_no_gradient(engine: Any) -> None:
    """Another token behind a masked label changes nothing, and a batch without any label has gradient zero."""
    nothing, report = runs.gradients(engine, [Micro(SEGMENTS, [np.zeros(len(mask)) for mask in MASKS])])
    assert (report.loss, report.tokens, report.grad_norm) == (0.0, 0, 0.0)
    assert not any(value.any() for value in nothing.values())
    plain, other = Micro(SEGMENTS, MASKS), Micro(SEGMENTS, MASKS)
    other.labels = np.where(other.loss_mask == 0, 7, other.labels)
    first, second = runs.gradients(engine, [plain])[0], runs.gradients(engine, [other])[0]
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_segments_of_the_same_length_and_of_different_lengths_agree(engine: Any) -> None:
    """Equal lengths take a shorter path through the attention."""
    rows = torch.arange(48).reshape(3, 16).numpy()
    equal = _logits(engine, list(rows))
    mixed = _logits(engine, [*rows, np.array([3, 4])])[:48]
    assert np.abs(equal - mixed).max() <= engine.bound


@dataclass(frozen=True)
class Split:
    """A rank's findings, segments split over two context-parallel ranks; `blocks` and the rest: of samples alone, then packed."""

    alone: np.ndarray
    packed: np.ndarray
    changed: np.ndarray
    blocks: list[list[Block]]
    losses: list[float]
    tokens: list[int]


def _padded(segments: list[np.ndarray], masks: list[np.ndarray]) -> Micro:
    """With a segment of padding behind them, so that the stream splits into four equal chunks."""
    padding = 4 - sum(map(len, segments)) % 4
    return Micro([*segments, np.zeros(padding, dtype=np.int64)], [*masks, np.zeros(padding)])


def _padded_logits(engine: Any, segments: list[np.ndarray]) -> np.ndarray:
    (found,), _ = engine.logits(runs.on_device([_padded(segments, [np.ones(len(segment)) for segment in segments])]))
    return found[: sum(map(len, segments))].numpy()


def split_over_two(parent: Path, precision: str, layout: dict[str, Any]) -> Split:
    """Logits [T, V], gradients and losses on this rank."""
    with runs.engine(parent, layout, {"gradient": "ste"}, precision, shape={"router_n_groups": 4}) as built:
        runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
        alone = np.concatenate([_padded_logits(built, [segment]) for segment in SEGMENTS])
        packed, changed = _padded_logits(built, SEGMENTS), _padded_logits(built, CHANGED)
        blocks, losses, tokens = [], [], []
        for micro in [*(([segment], [mask]) for segment, mask in zip(SEGMENTS, MASKS, strict=True)), (SEGMENTS, MASKS)]:
            report = built.step(runs.on_device([_padded(*micro)]), 0.0)
            blocks.append(runs.held_blocks(built))
            losses.append(report.loss)
            tokens.append(report.tokens)
        return Split(alone, packed, changed, blocks, losses, tokens)


@pytest.mark.parametrize("layout", [{"context": 2}, {"context": 2, "expert": 2}], ids=["CP2", "CP2 EP2"])
def test_segments_split_over_context_ranks_are_their_samples_alone(engine: Any, parent: Path, layout: dict[str, Any]) -> None:
    """Logits, gradients and neighbours' independence through the whole engine; samples alone on the same ranks and on one."""
    bound = engine.bound
    one_rank = np.concatenate([_logits(engine, [segment]) for segment in SEGMENTS])
    whole, _ = runs.gradients(engine, [Micro(SEGMENTS, MASKS)])
    precision = next(name for name, value in BOUNDS.items() if value == bound)
    ranks = run_on_ranks(split_over_two, 2, parent, precision, layout)
    own = slice(10, 27)
    for rank in ranks:
        for found in (rank.alone, rank.packed):
            assert np.abs(found - one_rank).max() <= bound
        assert np.abs(rank.packed[own] - rank.changed[own]).max() > 0.1
        assert np.abs(np.delete(rank.packed, own, 0) - np.delete(rank.changed, own, 0)).max() <= bound
        assert sum(rank.tokens[:-1]) == rank.tokens[-1] == sum(int(mask.sum()) for mask in MASKS)
        weighted = sum(loss * count for loss, count in zip(rank.losses[:-1], rank.tokens[:-1], strict=True))
        assert weighted / rank.tokens[-1] == pytest.approx(rank.losses[-1], rel=max(bound, 2e-7))
    *alone, packed = (runs.merged([rank.blocks[step] for rank in ranks]) for step in range(len(SEGMENTS) + 1))
    for name, value in packed.items():
        due = sum(each[name].astype(np.float64) * count for each, count in zip(alone, ranks[0].tokens, strict=False))
        assert relative(value * ranks[0].tokens[-1], due) <= max(bound, 2e-7), name
        assert relative(value, whole[name].reshape(value.shape)) <= max(bound, 2e-7), name
    assert len(packed) == len(whole)
