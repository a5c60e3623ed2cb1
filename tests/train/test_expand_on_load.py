"""Training from a parent and a plan is training from the written child: the same bits on every rank, of fewer bytes read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.logical import ExpandedWeights, StoredWeights, Weights
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from tests.expansions import INITS, SIZES, SLOTS, expert_bytes, needed_bytes, plan_of, recorded_reads, write_child
from tests.processes import run_on_ranks
from tests.upcycle import families, stacks

RANKS = 4
EXPERT_PARALLEL: tuple[dict[str, Any], ...] = ({"expert": 1}, {"expert": 2}, {"expert": 4})
MIXED: tuple[dict[str, Any], ...] = ({"pipeline": 2, "expert": 2}, {"tensor": 2, "expert": 2})
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("split", "fused")
BLOCK, BALANCED = "expert noise", "exact copies"
"""Inits whose placements keep few parents on a rank, and all on every rank."""

Digests = dict[str, dict[str, str]]
"""SHA-256 of every parameter of a rank, by source."""


# ---------------------------------------------------------------- on the ranks


def _sources(parents: Path, children: Path, init: str) -> dict[str, Weights]:
    """The same child four times: written in either layout, and unwritten, of a parent in either."""
    found: dict[str, Weights] = {}
    for layout in LAYOUTS:
        recipe = Recipe(open_checkpoint(parents / layout), read_plan(children / f"{init} {layout}.json"))
        found[f"of a {layout} parent"] = ExpandedWeights(recipe)
        found[f"written {layout}"] = StoredWeights(open_checkpoint(children / f"{init} {layout}"))
    return found


def _fill(engine: Any, weights: Weights) -> dict[str, str]:
    """Load into parameters that hold no numbers and hash all bytes."""
    from moexpand.train.weights import load

    with torch.no_grad():
        for parameter in engine.stages[0].parameters():
            parameter.fill_(float("nan"))
    load(engine, weights)
    assert not any(parameter.isnan().any() for parameter in engine.stages[0].parameters())
    return {
        name: hashlib.sha256(stacks.bits(parameter.detach().contiguous()).numpy().tobytes()).hexdigest()
        for name, parameter in engine.stages[0].named_parameters()
    }


def _fill_all(base: Path) -> tuple[dict[tuple[str, str, str], Digests], dict[str, dict[tuple[int, int], int]]]:
    """On a rank: what was filled by layout, precision and init, and the expert bytes that were read at EP 4 by init."""
    from moexpand.parallel import ranks
    from moexpand.parallel.engine import Engine
    from moexpand.parallel.shape import Layout, RouterRules
    from moexpand.train.setup import shape_of

    cases = [(dtype, init) for dtype in DTYPES for init in INITS]
    sources = {case: _sources(base / case[0] / "parents", base / case[0] / "children", case[1]) for case in cases}
    filled: dict[tuple[str, str, str], Digests] = {}
    read: dict[str, dict[tuple[int, int], int]] = {}
    for layout in EXPERT_PARALLEL + MIXED:
        here = ranks.start(Layout(**layout), timeout_seconds=120)
        for (dtype, init), each in sources.items():
            if layout in MIXED and dtype == "fp32":
                continue
            precision = "fp32" if layout in MIXED else dtype  # a bf16 folder in an fp32 engine, too
            shape = shape_of(each["written split"].architecture)
            engine = Engine(shape, Layout(**layout), RouterRules(), precision, here)
            filled[str(layout), dtype, init] = {name: _fill(engine, weights) for name, weights in each.items()}
            if layout == {"expert": RANKS} and dtype == "bf16" and init in (BLOCK, BALANCED):
                with recorded_reads() as reads:
                    _fill(engine, each["of a split parent"])
                read[init] = expert_bytes(base / dtype / "parents" / "split", reads)
        ranks.stop()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a quicker rank would meet the others' old store
    return filled, read


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parents in both layouts and dtypes, and for every init a plan and a child of each."""
    base = tmp_path_factory.mktemp("expansions")
    for name, dtype in DTYPES.items():
        parents, children = base / name / "parents", base / name / "children"
        children.mkdir(parents=True)
        for layout in LAYOUTS:
            parent = families.make("qwen3_moe", parents / layout, fused=layout == "fused", dtype=dtype, **SIZES).folder
            for init in INITS:
                plan = plan_of(parent, init)
                (children / f"{init} {layout}.json").write_text(json.dumps(plan.to_json()))
                write_child(parent, plan, children / f"{init} {layout}", layout)
    return base


@pytest.fixture(scope="module")
def answers(base: Path) -> list[Any]:
    """What `_fill_all` found on each of four ranks."""
    return run_on_ranks(_fill_all, RANKS, base)


@pytest.mark.parametrize("init", INITS)
def test_every_rank_holds_the_bits_of_the_written_child(answers: list[Any], init: str) -> None:
    """At EP 1, 2 and 4 in bf16 and fp32, and under pipeline and tensor parallelism."""
    cases = [case for case in answers[0][0] if case[2] == init]
    assert len(cases) == len(EXPERT_PARALLEL) * len(DTYPES) + len(MIXED)
    for filled, _ in answers:
        for case in cases:
            first, *others = filled[case].values()
            assert len(first) >= 10
            assert len(others) == 3
            for name, digests in filled[case].items():
                assert digests == first, (case, name)


def test_ranks_and_inits_differ(answers: list[Any]) -> None:
    """Equal digests mean something: no two inits fill the same, and no two ranks of EP 4 hold the same experts."""
    filled = [answer[0] for answer in answers]
    of_inits = {json.dumps(filled[0][str({"expert": 1}), "fp32", init]["written split"]) for init in INITS}
    assert len(of_inits) == len(INITS)
    for init in INITS:
        ranks = [each[str({"expert": 4}), "fp32", init]["written split"] for each in filled]
        experts = {json.dumps({name: digest for name, digest in each.items() if ".experts." in name}) for each in ranks}
        assert len(experts) == RANKS, init


@pytest.mark.parametrize("init", [BLOCK, BALANCED])
def test_a_rank_reads_each_parent_of_its_slots_once_and_no_other(answers: list[Any], base: Path, init: str) -> None:
    parent, own = base / "bf16" / "parents" / "split", SLOTS // RANKS
    plan = read_plan(base / "bf16" / "children" / f"{init} split.json")
    for rank, (_, read) in enumerate(answers):
        assert read[init] == needed_bytes(parent, plan, range(rank * own, (rank + 1) * own))
        if init == BLOCK:
            assert len(read[init]) == SIZES["layers"] * SIZES["experts"] // RANKS, "a quarter of the parent"
