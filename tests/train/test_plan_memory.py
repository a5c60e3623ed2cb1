"""The planner's arithmetic against engines that are built, run and looked at: numbers, bytes, and what travels between ranks."""

from collections import Counter
from functools import cache
from typing import Any

import pytest

from moexpand.conf.train_schema import Parallel
from moexpand.train import plan_memory
from moexpand.train.plan_memory import Work, layer_activations, parameters, rows_of_rank, stages
from moexpand.train.plan_traffic import traffic
from moexpand.upcycle.architecture import Architecture
from tests.processes import run_on_ranks
from tests.train.measured import SHAPE, TOKENS, Measured, measure, travelled

LAYERS = 4
LAYOUTS: list[tuple[dict[str, Any], int, int]] = [
    ({}, 1, 1),
    ({"recompute": "selective"}, 1, 1),
    ({"recompute": "full"}, 1, 1),
    ({"expert": 2}, 2, 1),
    ({"expert": 2, "dispatcher": "grouped_allgather"}, 2, 1),
    ({"tensor": 2, "expert": 2}, 2, 1),
    ({"context": 2}, 2, 1),
    ({"pipeline": 2}, 2, 4),
    ({"pipeline": 2, "first_layers": 1}, 2, 4),
    ({"pipeline": 2, "interleave": 2}, 2, 4),
]
"""Layout, ranks, micro-batches a step of a data-parallel rank."""


def work_of(layout: dict[str, Any], world: int, micro_batches: int, precision: str) -> Work:
    parallel = Parallel(**layout)
    replicas = world // (parallel.tensor * parallel.context * parallel.pipeline)
    architecture = Architecture(num_hidden_layers=LAYERS, **SHAPE)  # type: ignore[arg-type]
    return Work(architecture, 0, precision, TOKENS, 1, micro_batches * replicas)


@cache
def _measured(number: int, precision: str) -> list[Measured]:
    layout, world, micro_batches = LAYOUTS[number]
    return run_on_ranks(measure, world, layout, precision, LAYERS, TOKENS, micro_batches)


@pytest.mark.layouts
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout, _, _ in LAYOUTS])
def test_every_part_of_the_memory_is_what_an_engine_holds(number: int, precision: str) -> None:
    layout, world, micro_batches = LAYOUTS[number]
    parallel, work = Parallel(**layout), work_of(layout, world, micro_batches, precision)
    for rank, found in enumerate(_measured(number, precision)):
        stage_number = rank * parallel.pipeline // world
        stage = stages(LAYERS, parallel)[stage_number]
        expected = parameters(work, parallel, stage)
        assert (found.dense, found.experts) == (expected.dense, expected.experts)
        held = plan_memory._memory(work, parallel, world, stage, stage_number)
        assert found.weights == held.weights
        assert found.gradients == pytest.approx(held.gradients, rel=2e-3)  # Megatron-Core fills its buffers up
        assert found.optimiser == pytest.approx(held.optimiser, rel=2e-3)  # and cuts them where they are even
        # On a CPU gathered rows share one lasting piece of memory (parallel/expert_mlp.py) that is no part of the peak.
        own = parallel.expert == 1 or parallel.dispatcher == "grouped_allgather"
        scratch = 2 * rows_of_rank(work, parallel) * SHAPE["hidden_size"] * work.width if own else 0
        peak = held.activations + held.dispatch + held.working
        if parallel.context > 1 and precision == "bf16":
            continue  # a CPU's attention keeps the scores of chunks in bf16
        assert peak - scratch < 1.15 * found.peak, (peak - scratch) / found.peak
        assert peak > 0.92 * found.peak, peak / found.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_what_the_formula_says(precision: str) -> None:
    """The difference of two depths, without recomputation, to 2 %."""
    two, four = (run_on_ranks(measure, 1, {}, precision, layers)[0] for layers in (2, 4))
    predicted = sum(layer_activations(work_of({}, 1, 1, precision), Parallel()))
    assert (four.saved - two.saved) / 2 == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ({}, 2),
        ({"expert": 2}, 2),
        ({"expert": 2, "dispatcher": "grouped_allgather"}, 2),
        ({"tensor": 2, "expert": 2}, 2),
        ({"pipeline": 2}, 2),
        ({"tensor": 2, "expert": 2}, 4),
    ],
    ids=str,
)
def test_what_travels_is_what_the_ranks_send(layout: dict[str, Any], world: int) -> None:
    """Bytes of rank 0 by kind of collective, counted at torch's dispatcher; only figures of a few numbers are left out."""
    micro_batches = 2
    work = work_of(layout, world, micro_batches, "fp32")
    expected = Counter({each.purpose: each.nbytes for each in traffic(work, Parallel(**layout), world, 8)})
    found = run_on_ranks(travelled, world, layout, LAYERS, micro_batches)[0]
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.06), (found, expected)


def test_pipeline_stages_hold_as_many_micro_batches_as_are_ahead() -> None:
    work = work_of({}, 4, 8, "bf16")
    parallel = Parallel(pipeline=4)
    assert [plan_memory.micro_batches_in_flight(work, parallel, 4, number) for number in range(4)] == [4, 3, 2, 1]
    assert plan_memory.micro_batches_in_flight(work_of({"pipeline": 4}, 4, 2, "bf16"), parallel, 4, 0) == 2
