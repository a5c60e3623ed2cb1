"""Places of pictures in a stream: positions on three axes against transformers, features at tokens, dealing over ranks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLMoeConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

from moexpand.parallel.pictures import Grid, Pictures, axes, deal, feature_at, features_of

IMAGE, MERGE = 9, 2
MERGED = st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6))
SEGMENT = st.lists(st.one_of(st.integers(1, 7), MERGED), min_size=1, max_size=5)
"""Runs of text (their lengths) and pictures (frames, rows and columns of features)."""


def _laid_out(segment: list) -> tuple[list[int], list[Grid]]:
    tokens: list[int] = []
    grids: list[Grid] = []
    for part in segment:
        if isinstance(part, int):
            tokens += [1] * part
        else:
            frames, rows, columns = part
            # as every family writes a picture: a token before it and one behind it
            tokens += [2, *[IMAGE] * (frames * rows * columns), 3]
            grids.append((frames, rows * MERGE, columns * MERGE))
    return tokens, grids


class _Positions(Qwen3VLMoeModel):
    """transformers' counting of positions, without the weights of a model."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.config = Qwen3VLMoeConfig(vision_config={"spatial_merge_size": MERGE})


def _transformers(tokens: list[int], grids: list[Grid]) -> np.ndarray:
    ids = torch.tensor([tokens])
    kinds = (ids == IMAGE).int()
    positions, _ = _Positions().get_rope_index(ids, kinds, torch.tensor(grids) if grids else None)
    return positions[:, 0].numpy()


@settings(max_examples=150, deadline=None)
@given(st.lists(SEGMENT, min_size=1, max_size=4))
def test_positions_are_those_of_transformers_in_every_segment(segments: list) -> None:
    laid_out = [_laid_out(segment) for segment in segments]
    tokens = np.array([token for own, _ in laid_out for token in own])
    bounds = np.cumsum([0] + [len(own) for own, _ in laid_out]).astype(np.int32)
    found = axes(tokens, bounds, [grid for _, grids in laid_out for grid in grids], IMAGE, MERGE)
    due = np.concatenate([_transformers(own, grids) for own, grids in laid_out], axis=1)
    assert np.array_equal(found, due)


def test_a_feature_stands_at_each_placeholder() -> None:
    assert feature_at(np.array([1, IMAGE, IMAGE, 2, IMAGE, 1]), IMAGE).tolist() == [-1, 0, 1, -1, 2, -1]
    assert features_of((1, 4, 6), 2) == 6


@given(st.lists(st.integers(1, 4000), max_size=30), st.integers(1, 8))
def test_every_picture_is_dealt_once_and_no_rank_has_much_more_than_its_share(costs: list[int], ranks: int) -> None:
    hands = deal(costs, ranks)
    assert len(hands) == ranks
    assert sorted(number for hand in hands for number in hand) == list(range(len(costs)))
    assert all(hand == sorted(hand) for hand in hands)
    loads = [sum(costs[number] for number in hand) for hand in hands]
    # Graham's bound for the longest first: 4/3 - 1/(3 ranks) of the best, which is at least the mean and the largest cost
    best = max([sum(costs) / ranks, *costs], default=0)
    if len(costs) > ranks:  # two of the ranks + 1 most costly share a rank
        first = sorted(costs, reverse=True)[: ranks + 1]
        best = max(best, first[-1] + first[-2])
    assert max(loads) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


def test_pixels_are_looked_up_by_colour_and_repeated_for_every_frame() -> None:
    drawn = np.random.default_rng(0)
    table = torch.from_numpy(drawn.normal(size=(3, 256)).astype(np.float32))
    patches = torch.from_numpy(drawn.integers(0, 256, (4 + 8, 3 * 4), dtype=np.uint8))
    pictures = Pictures(patches, [(1, 2, 2), (1, 2, 4)], table)
    found = pictures.pixels([1], 2)
    assert found.shape == (8, 3 * 2 * 4)
    for patch in range(8):
        for colour in range(3):
            values = table[colour][patches[4 + patch].view(3, 4)[colour].long()]
            own = found[patch].view(3, 2, 4)[colour]
            assert torch.equal(own[0], values)
            assert torch.equal(own[1], values)
    assert torch.equal(pictures.pixels([0, 1], 1)[4:], pictures.pixels([1], 1))
