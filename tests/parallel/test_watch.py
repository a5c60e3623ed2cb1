"""What is told of routers and loads equals a computation in float64 numpy, written from the definitions."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.base.routing import route
from moexpand.parallel import ranks
from moexpand.parallel.shape import Layout
from moexpand.parallel.watch import ParentRouter, RouterWatch
from moexpand.train.metrics import load_metrics
from tests.parallel import runs
from tests.parents import TINY, make_child, make_parent
from tests.processes import run_on_ranks

EXPERTS, GROUPS, TOP_K, PARENTS, HIDDEN, LAYERS = 24, 4, 8, 6, 5, 4
PARENT_OF = np.array([0, 1, 2, 3, 4, 5] * 4)
PARENT_TOP_K = 3
Call = tuple[int, np.ndarray, np.ndarray]
"""Decoder layer, hidden states [T, H] and logits [T, E] of a router's forward pass."""


def calls(seed: int, tokens: list[int], layers: list[int]) -> list[Call]:
    """Forward passes with made-up logits, one for each number of tokens and layer; numbers that fp32 holds."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32).astype(np.float64)

    return [(layer, draw(count, HIDDEN), 2 * draw(count, EXPERTS)) for count in tokens for layer in layers]


PARENT_WEIGHT = calls(9, [PARENTS], [0])[0][1]


def best(row: np.ndarray, count: int, groups: int) -> list[int]:
    """The experts that a token visits: in every group the `count / groups` largest."""
    members = np.arange(len(row)).reshape(groups, -1)
    return [expert for own in members for expert in sorted(own, key=lambda e: (-row[e], e))[: count // groups]]


def due_figures(seen: list[Call], with_parent: tuple[int, ...], parent_groups: int = 1) -> dict[str, np.ndarray]:
    """Means over the tokens of each of four layers; the parent's figures of the layers `with_parent`."""
    names = ("entropy", "margin", "parent_overlap", "parents")
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(LAYERS)] for name in names}
    for layer, tokens_TH, logits_TE in seen:
        for x, z in zip(tokens_TH, logits_TE, strict=True):
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            found["entropy"][layer].append(-(p * np.log(p)).sum() / math.log(EXPERTS))
            ranked = -np.sort(-z.reshape(GROUPS, -1), axis=1)
            found["margin"][layer].append((ranked[:, TOP_K // GROUPS - 1] - ranked[:, TOP_K // GROUPS]).mean())
            if layer in with_parent:
                visited = {int(PARENT_OF[expert]) for expert in best(z, TOP_K, GROUPS)}
                wanted = best(PARENT_WEIGHT @ x, PARENT_TOP_K, parent_groups)
                found["parent_overlap"][layer].append(np.mean([expert in visited for expert in wanted]))
                found["parents"][layer].append(len(visited))
    return {name: np.array([np.mean(each) if each else np.nan for each in rows]) for name, rows in found.items()}


def watched(
    seen: list[Call], dtype: torch.dtype, with_parent: tuple[int, ...], parent_groups: int | None = 1
) -> dict[str, np.ndarray]:
    """What a watch finds, told of these forward passes by routers of which it only knows layer and groups."""
    weight, parent_of = torch.tensor(PARENT_WEIGHT, dtype=dtype), torch.tensor(PARENT_OF)
    parent = ParentRouter(weight, parent_of, PARENT_TOP_K, parent_groups)
    watch = RouterWatch(dict.fromkeys(with_parent, parent))
    routers: list[Any] = [SimpleNamespace(layer=layer, groups=GROUPS, statistics=None) for layer in range(LAYERS)]
    with watch.watching(routers):
        for layer, tokens_TH, logits_TE in seen:
            logits = torch.tensor(logits_TE, dtype=dtype)
            _, chosen_TK, probabilities_TE = route(logits, TOP_K, GROUPS)
            routers[layer].statistics(torch.tensor(tokens_TH, dtype=dtype), logits, probabilities_TE, chosen_TK)
    assert all(router.statistics is None for router in routers)
    return {name: values.numpy() for name, values in watch.take(LAYERS).items()}


@pytest.fixture
def alone() -> Iterator[None]:
    ranks.start(Layout())
    yield
    ranks.stop()


@pytest.mark.parametrize("parent_groups", [1, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_figures_are_means_over_the_tokens(alone: None, dtype: torch.dtype, bound: float, parent_groups: int) -> None:
    """Micro-batches of different lengths; layer 1 knows no parent, layer 3 lies on no rank."""
    seen = calls(0, [37, 5], [0, 1, 2])
    due = due_figures(seen, (0, 2), parent_groups)
    found = watched(seen, dtype, (0, 2), parent_groups)
    np.testing.assert_allclose([found[name] for name in due], list(due.values()), rtol=0, atol=bound)
    assert np.isnan(due["parent_overlap"]).tolist() == np.isnan(due["parents"]).tolist() == [False, True, False, True]
    assert np.isnan(due["entropy"]).tolist() == [False, False, False, True]
    assert 0.3 < due["parent_overlap"][0] < 1, "the parent's choice is neither always met nor never"


def test_a_token_by_hand(alone: None) -> None:
    """Probabilities 1/2, 1/8, 1/4, 1/8 in two groups have 7/4 of 2 bits; both chosen experts are copies of parent 0."""
    logits = torch.tensor([[4.0, 1.0, 2.0, 1.0]], dtype=torch.float64).log()
    parent = ParentRouter(torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1, 0, 2]), top_k=2)
    for parents, overlap, distinct in (({0: parent}, 0.5, 1.0), ({}, math.nan, math.nan)):
        watch, router = RouterWatch(parents, probe=1), SimpleNamespace(layer=0, groups=2, statistics=None)
        with watch.watching([router]):
            hidden = torch.ones(1, 1, dtype=torch.float64)
            router.statistics(hidden, logits, logits.softmax(-1), torch.tensor([[0, 2]]))
        found = {name: float(values) for name, values in watch.take(1).items()}
        due = {"entropy": 7 / 8, "margin": 1.5 * math.log(2), "parent_overlap": overlap, "parents": distinct}
        assert found == pytest.approx(due, abs=1e-14, nan_ok=True)
        assert torch.equal(watch.probes[0], hidden)
    with watch.watching([router]):
        router.statistics(hidden, logits, logits.softmax(-1), torch.arange(4)[None])
    assert watch.take(1)["margin"].tolist() == [0.0], "groups that are visited whole leave nobody out"
    with watch.watching([router]):  # as a selection bias or replayed routes may have it
        router.statistics(hidden, logits, logits.softmax(-1), torch.tensor([[1, 2]]))
    assert watch.take(1)["margin"].tolist() == pytest.approx([(math.log(2) - math.log(4)) / 2], abs=1e-14)


def own_calls(rank: int) -> list[Call]:
    """Other tokens, and other numbers of them, on each rank; layer 2 lies on rank 1 alone."""
    return calls(10 + rank, [11, 4] if rank == 0 else [29], [0, 1] if rank == 0 else [0, 1, 2])


def merged() -> dict[str, np.ndarray]:
    here = ranks.start(Layout(), timeout_seconds=120)
    found = watched(own_calls(here.world_rank), torch.float64, (0, 2))
    ranks.stop()
    return found


def test_two_ranks_tell_the_means_over_the_tokens_of_both() -> None:
    due = due_figures(own_calls(0) + own_calls(1), (0, 2))
    for found in run_on_ranks(merged, 2):
        np.testing.assert_allclose([found[name] for name in due], list(due.values()), rtol=0, atol=1e-13)


@pytest.fixture(scope="module")
def tiny_child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = make_parent(tmp_path_factory.mktemp("watch") / "parent", **(TINY | {"experts": 8, "top_k": 4, "layers": 2}))
    return make_child(parent, parent.with_name("child"), placement="quarters_spread", num_experts=32, num_groups=4)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_training_step_is_watched_once(tiny_child: Path, recompute: str) -> None:
    """In float64, from the hidden states that came to the routers, also where they come twice."""
    seen: dict[int, list[np.ndarray]] = {0: [], 1: []}
    with runs.engine(tiny_child, {"recompute": recompute}, {}, "fp64") as built:
        runs.prepare(built)
        for router in built.routers:
            router.register_forward_pre_hook(
                lambda router, given: seen[router.layer].append(given[0].numpy(force=True)) if torch.is_grad_enabled() else None
            )
        rows = [router.weight.numpy(force=True).copy() for router in built.routers]
        batches = runs.on_device([runs.micro_batch(number, vocab=TINY["vocab"]) for number in range(2)])
        report = built.step(batches, 0.0, watch=RouterWatch())
    for layer, weight in enumerate(rows):
        z_TE = np.concatenate(seen[layer]) @ weight.T
        assert len(z_TE) == 128
        p_TE = np.exp(z_TE) / np.exp(z_TE).sum(1, keepdims=True)
        ranked = -np.sort(-z_TE.reshape(-1, 4, 8), axis=2)
        assert report.watched["entropy"][layer] == pytest.approx(-(p_TE * np.log(p_TE)).sum() / 128 / math.log(32), abs=1e-12)
        assert report.watched["margin"][layer] == pytest.approx((ranked[..., 0] - ranked[..., 1]).mean(), abs=1e-12)
    assert report.watched["parent_overlap"].isnan().all()
    assert {"forward_backward", "optimizer"} <= report.seconds.keys()


def test_the_parents_routers_are_read_off_the_child(tiny_child: Path) -> None:
    """From the first slot of each parent, which expansion leaves exact while the other copies have noise."""
    from moexpand.train.telemetry import parent_routers, parents_of
    from moexpand.upcycle.checkpoint import open_checkpoint

    source = _source(tiny_child)
    found = parent_routers(source, parents_of(source, [0, 1]))
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.gate.weight"
        due = open_checkpoint(tiny_child.with_name("parent")).read_torch(name)
        assert torch.equal(found[layer].weight, due)
        assert (found[layer].top_k, found[layer].groups) == (4, 1)
        exact = (source.checkpoint.read_torch(name) == due[found[layer].parent_of]).all(1)
        assert int(exact.sum()) == 8, "one copy of each parent"


def _source(folder: Path) -> Any:
    from moexpand.train.preflight import Source
    from moexpand.upcycle.checkpoint import open_checkpoint
    from moexpand.upcycle.logical import StoredWeights

    stored = StoredWeights(open_checkpoint(folder))
    return Source(stored.architecture, stored)


@pytest.fixture(scope="module")
def block_child(tiny_child: Path) -> Path:
    """Of the same parent; every group holds copies of one block of the parent's experts, as in children of grouped parents."""
    return make_child(
        tiny_child.with_name("parent"), tiny_child.with_name("block"), placement="block", num_experts=32, num_groups=4
    )


def test_a_block_child_of_a_parent_without_groups_is_compared_with_plain_top_k(block_child: Path) -> None:
    """At step 0 it visits one of every pair of the parent's experts, where the parent takes the best 4 of 8."""
    from moexpand.conf.train_schema import Track
    from moexpand.train.telemetry import Telemetry
    from moexpand.upcycle.checkpoint import open_checkpoint

    source = _source(block_child)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {0: [], 1: []}
    with runs.engine(block_child, {}, {}, "fp64") as built:
        runs.prepare(built)
        for router in built.routers:
            router.register_forward_hook(lambda router, given, choice: seen[router.layer].append((given[0], choice.chosen)))
        telemetry = Telemetry(Track(), source, built)
        report = built.step(runs.on_device([runs.micro_batch(0, vocab=TINY["vocab"])]), 0.0, watch=telemetry.watch(1))
        row = telemetry.row(1, report)
    due = []
    for layer, parent_of in enumerate(source.expansion.slot_to_parent):
        weight_PH = open_checkpoint(block_child.with_name("parent")).read_torch(f"model.layers.{layer}.mlp.gate.weight").double()
        ((x_TH, chosen_TK),) = seen[layer]
        for x, chosen in zip(x_TH.numpy(force=True), chosen_TK.tolist(), strict=True):
            wanted = np.argsort(-(weight_PH.numpy() @ x))[:4].tolist()
            due.append(len({parent_of[slot] for slot in chosen} & set(wanted)) / 4)
    assert row["moe/router_parent_overlap"] == pytest.approx(np.mean(due), abs=1e-6)
    assert 0.3 < np.mean(due) < 0.95
    assert row["moe/router_parents"] == 4.0


def test_the_parents_groups_are_known_or_the_overlap_is_left_out(tiny_child: Path, block_child: Path, tmp_path: Path) -> None:
    """From the record of the expansion or from the parent itself; a record without them tells by its map, or not at all."""
    from moexpand.conf.train_schema import Track
    from moexpand.train.preflight import Source
    from moexpand.train.telemetry import parent_routers, parents_of, telemetry_notes
    from moexpand.upcycle.checkpoint import open_checkpoint
    from moexpand.upcycle.logical import ExpandedWeights
    from moexpand.upcycle.recipe import Recipe

    grandchild = make_child(block_child, tmp_path / "grandchild", placement="block", num_experts=64, num_groups=4)
    assert [_source(folder).parent_groups for folder in (tiny_child, block_child, grandchild)] == [1, 1, 4]
    plan = _source(grandchild).expansion
    while_loading = ExpandedWeights(Recipe(open_checkpoint(block_child), plan))
    assert Source(while_loading.architecture, while_loading, plan).parent_groups == 4
    for folder, due in ((tiny_child, 1), (block_child, None), (grandchild, None)):
        old = tmp_path / f"old_{folder.name}"
        shutil.copytree(folder, old)
        record = json.loads((old / "expansion.json").read_text())
        del record["parent_groups"]
        (old / "expansion.json").write_text(json.dumps(record))
        source = _source(old)
        assert source.parent_groups == due
        notes = telemetry_notes(Track(), source)
        assert len(notes) == (due is None)
        assert not telemetry_notes(Track(routing_every=0), source)
        assert {router.groups for router in parent_routers(source, parents_of(source, [0, 1])).values()} == {due}


def test_without_the_parents_groups_only_its_experts_are_counted(alone: None) -> None:
    seen = calls(0, [37, 5], [0, 1, 2])
    due, found = due_figures(seen, (0, 2)), watched(seen, torch.float64, (0, 2), None)
    assert np.isnan(found["parent_overlap"]).all()
    np.testing.assert_allclose(found["parents"], due["parents"], rtol=0, atol=1e-13)


def test_load_figures_are_those_of_numpy() -> None:
    """With experts that get nothing, a group that gets nothing, and a load that differs tenfold between layers."""
    counts_LE = np.random.default_rng(4).poisson([[2.0], [20.0], [0.5]], (3, 24)).astype(np.float64)
    counts_LE[2, :6] = 0
    due = []
    for row in counts_LE:
        groups, share = row.reshape(4, 6), row[row > 0] / row.sum()
        due.append(
            {
                "moe/load_cv": row.std() / row.mean(),
                "moe/load_max": row.max() / row.mean(),
                "moe/load_entropy": -(share * np.log(share)).sum() / math.log(24),
                "moe/dead_experts": (row == 0).mean(),
                "moe/group_load_cv": np.mean([own.std() / own.mean() if own.any() else 0.0 for own in groups]),
                "moe/group_load_max": max(own.max() / own.mean() for own in groups if own.any()),
            }
        )
    found = load_metrics(torch.from_numpy(counts_LE), groups=4)
    assert found == pytest.approx({name: np.mean([each[name] for each in due]) for name in due[0]}, rel=1e-13)
    assert 0.1 < found["moe/dead_experts"] < 0.6


def test_a_row_has_the_means_over_the_layers_that_know_a_figure() -> None:
    """At the steps that `track` names and the first; a figure that no layer knows is left out."""
    from moexpand.conf.train_schema import Track
    from moexpand.train.telemetry import Telemetry

    source: Any = SimpleNamespace(expansion=None, checkpoint=None)
    engine: Any = SimpleNamespace(routed_layers=[0, 1, 2])
    telemetry = Telemetry(Track(routing_every=3, siblings_every=2), source, engine)
    assert [step for step in range(1, 10) if telemetry.watch(step) is not None] == [1, 3, 6, 9]
    known = torch.tensor([0.25, torch.nan, 0.75], dtype=torch.float64)
    report: Any = SimpleNamespace(watched={"margin": known, "parents": known * torch.nan}, seconds={"router": 2.0})
    assert telemetry.row(3, report) == {"moe/router_margin": 0.5, "time/router": 2.0}
