"""Inputs made to upset a router: the ranks' rows stay equal where they must, and nothing hangs or turns into NaN."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel import runs
from tests.parallel.runs import Micro
from tests.processes import run_on_ranks

RANKS, TOKENS = 2, 64


@dataclass(frozen=True)
class Case:
    """A step on `TOKENS` tokens a rank, all the same or not, with a router that sends everything to the lowest experts or not."""

    folder: Path
    layout: dict[str, Any]
    alike: bool
    collapsed: bool


def _batch(alike: bool, rank: int) -> Micro:
    generator = np.random.default_rng(rank)
    if not alike:
        return Micro([generator.integers(0, 256, TOKENS)], [np.ones(TOKENS)])
    # Segments of one token, so that attention makes no difference either; the labels are whatever follows.
    return Micro([np.array([7])] * TOKENS, [np.ones(1)] * TOKENS)


def steps(cases: list[Case]) -> list[tuple[list[float], list[float], list[list[float]], bool]]:
    """Losses of two steps, the ranks' rows and the layers' loads in the first, and whether all weights are finite then."""
    found = []
    for case in cases:
        with runs.engine(case.folder, case.layout, {"gradient": "ste", "balance_coefficient": 1e-2}) as built:
            runs.prepare(built)
            if case.collapsed:
                for layer in built.moe_layers:
                    # Experts' logits fall with their number, by steps that no token's own part makes up for.
                    direction = torch.zeros_like(layer.router.weight)
                    direction[:, 0] = -torch.arange(len(direction)).float()
                    layer.router.weight.data.copy_(direction)
                    layer.router.forward = _with_constant(layer.router.forward)
            batches = runs.on_device([_batch(case.alike, built.ranks.data_rank)])
            reports = [built.step(batches, 1e-4) for _ in range(2)]
            finite = all(bool(torch.isfinite(tensor).all()) for _, tensor in built.tensors())
            first = reports[0]
            found.append(([each.loss for each in reports], first.rank_rows.tolist(), first.dispatched.tolist(), finite))
    return found


def _with_constant(forward: Any) -> Any:
    """The router sees tokens whose first number is one and large."""

    def wrapped(tokens_TH: torch.Tensor, tags_T: torch.Tensor) -> Any:
        return forward(torch.cat((torch.full_like(tokens_TH[:, :1], 50.0), tokens_TH[:, 1:]), dim=1), tags_T)

    return wrapped


def _layout(dispatcher: str) -> dict[str, Any]:
    return {"expert": RANKS, "dispatcher": dispatcher}


@pytest.mark.parametrize("dispatcher", ["grouped_allgather", "alltoall", "allgather"])
def test_grouped_routing_gives_every_rank_as_many_rows(deep_child: Path, dispatcher: str) -> None:
    """With expert parallelism that divides the groups, whatever carries the tokens: tokens x K / EP, exactly."""
    cases = [Case(deep_child, _layout(dispatcher), alike, collapsed) for alike in (False, True) for collapsed in (False, True)]
    shape = runs.shape_of(deep_child)
    due = RANKS * TOKENS * shape.num_experts_per_tok * shape.num_hidden_layers / RANKS
    for losses, rows, load, finite in run_on_ranks(steps, RANKS, cases)[0]:
        assert rows == [due, due]
        assert finite
        assert np.isfinite(losses).all()
        assert np.sum(load) == due * RANKS


def misplaced(folder: Path) -> list[str]:
    """What the grouped dispatcher says to columns in the order of the groups, and to others."""
    said = []
    with runs.engine(folder, _layout("grouped_allgather"), {}) as built:
        own, generator = built.moe_layers[0].own, torch.Generator().manual_seed(0)
        tokens, ordered = torch.zeros(4, own.columns), torch.arange(8).repeat(4, 1) * 16
        late = torch.stack([row[torch.randperm(8, generator=generator)] for row in ordered])
        for chosen_TK in (ordered, ordered + 15, ordered.flip(1), late):
            try:
                own.gather(tokens, chosen_TK, torch.ones(4, 8))
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
    return said


def test_columns_of_another_ranks_experts_are_noticed(deep_child: Path) -> None:
    """The rows of a rank are tokens x K / EP because every column that it takes is of its own groups, which is looked at."""
    for fine, last, *wrong in run_on_ranks(misplaced, RANKS, deep_child):
        assert (fine, last) == ("", "")
        assert all("the chosen experts' columns are not in order of the groups" in each for each in wrong)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_plain_routing_shows_the_contrast_and_still_runs(deep_parent: Path, dispatcher: str) -> None:
    """A collapsed plain router sends every token to the first rank; the other has none in any layer and waits for nobody."""
    cases = [Case(deep_parent, _layout(dispatcher), alike=False, collapsed=True)]
    shape = runs.shape_of(deep_parent)
    (losses, rows, load, finite) = run_on_ranks(steps, RANKS, cases)[0][0]
    assert rows == [RANKS * TOKENS * shape.num_experts_per_tok * shape.num_hidden_layers, 0]
    assert np.count_nonzero(load[0]) == shape.num_experts_per_tok
    assert finite
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]


def test_all_tokens_to_one_expert(tmp_path: Path) -> None:
    """Top-1 routing that has collapsed: one expert computes everything, the rest nothing, on one rank and on two."""
    from tests.parents import make_parent

    parent = make_parent(tmp_path / "top_1", experts=16, top_k=1, hidden=32, intermediate=16, head_dim=8, max_shard_size="50KB")
    cases = [Case(parent, {"expert": RANKS, "dispatcher": name}, False, True) for name in ("alltoall", "allgather")]
    split = run_on_ranks(steps, RANKS, cases)[0]
    for losses, rows, load, finite in split:
        assert rows[1] == 0
        assert [np.count_nonzero(layer) for layer in load] == [1] * len(load)
        assert finite
        assert np.isfinite(losses).all()
    assert split[0][0] == pytest.approx(split[1][0], rel=1e-5)
