"""Twenty steps of training are the same on every layout.

With balance loss, z-loss, the straight-through gradient and masks that differ from micro-batch to micro-batch and so from rank
to rank: what a layout gets wrong in a sum, a mean or a reduction shows here. In float64 nothing is left to rounding.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel import runs
from tests.parallel.runs import Job, Row
from tests.processes import run_on_ranks

RULES = {"gradient": "ste", "balance_coefficient": 1e-2, "z_loss_coefficient": 1e-3}
TWO: dict[str, dict[str, Any]] = {
    "EP2": {"expert": 2},
    "EP2 allgather": {"expert": 2, "dispatcher": "allgather"},
    "DP2": {},
    "PP2": {"pipeline": 2},
    "PP2 recomputed": {"pipeline": 2, "recompute": "full"},
    "PP2 experts recomputed": {"pipeline": 2, "recompute": "selective"},
    "TP2": {"tensor": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "EP4": {"expert": 4},
    "EP2 DP2": {"expert": 2},
    "PP2 EP2": {"pipeline": 2, "expert": 2},
    "TP2 EP4": {"tensor": 2, "expert": 4},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
}
BOUNDS = {"fp32": (2e-5, 1e-4), "fp64": (1e-8, 1e-8)}
STEPS = {"fp32": 20, "fp64": 10}


def _far(found: list[Row], due: list[Row], loss: float, grad_norm: float) -> list[str]:
    """What lies outside the bounds, in words; empty when the curves are the same."""
    wrong = []
    assert len(found) == len(due)
    for step, (one, other) in enumerate(zip(found, due, strict=True)):
        pairs = [("loss", one.loss, other.loss, loss), ("grad_norm", one.grad_norm, other.grad_norm, grad_norm)]
        for layer, (mine, theirs) in enumerate(zip(one.balance, other.balance, strict=True)):
            pairs.append((f"balance of layer {layer}", mine, theirs, 10 * grad_norm))
        for layer, (mine, theirs) in enumerate(zip(one.z_loss, other.z_loss, strict=True)):
            pairs.append((f"z-loss of layer {layer}", mine, theirs, 10 * grad_norm))
        wrong += [f"step {step} {name}: {a!r} {b!r}" for name, a, b, bound in pairs if abs(a - b) > bound * abs(b)]
        if one.tokens != other.tokens:
            wrong.append(f"step {step} tokens: {one.tokens} {other.tokens}")
    return wrong


def _jobs(folder: Path, layouts: dict[str, dict[str, Any]], precisions: tuple[str, ...] = ("fp32", "fp64")) -> list[Job]:
    return [Job(folder, layout, RULES, precision, STEPS[precision]) for precision in precisions for layout in layouts.values()]


@pytest.fixture(scope="module")
def reference(parent: Path) -> dict[str, list[Row]]:
    """One rank."""
    found = runs.curves([Job(parent, {}, RULES, precision) for precision in BOUNDS])
    return dict(zip(BOUNDS, found, strict=True))


def test_the_loss_falls_by_five_percent_and_precisions_agree(reference: dict[str, list[Row]]) -> None:
    """A curve that stood still would hide a wrong gradient."""
    for rows in reference.values():
        assert rows[-1].loss < 0.95 * rows[0].loss
        assert rows[16].loss < 0.95 * rows[0].loss, "the same micro-batches as in step 0"
        assert len({row.tokens for row in rows}) > 1, "masks differ from step to step"
        assert min(rows[0].balance) > 1.0
    assert not _far(reference["fp32"], reference["fp64"], 2e-5, 1e-4)


@pytest.mark.parametrize(("size", "layouts"), [(2, TWO), (4, FOUR)], ids=["two ranks", "four ranks"])
def test_curves_are_the_same_on_every_layout(
    parent: Path, reference: dict[str, list[Row]], size: int, layouts: dict[str, dict[str, Any]]
) -> None:
    jobs = _jobs(parent, layouts)
    answers = run_on_ranks(runs.curves, size, jobs)
    assert all(answer == answers[0] for answer in answers), "every rank reports the same numbers"
    names = [f"{name} {precision}" for precision in BOUNDS for name in layouts]
    wrong = {
        name: far
        for name, job, rows in zip(names, jobs, answers[0], strict=True)
        if (far := _far(rows, reference[job.precision][: job.steps], *BOUNDS[job.precision]))
    }
    assert not wrong, {name: far[:3] for name, far in wrong.items()}


def test_a_grouped_child_trains_the_same_by_every_dispatcher(children: dict[str, Path]) -> None:
    """Ten steps in float64. In fp32 a near tie among 64 experts may go another way after a few, and then all that follows."""
    child, dispatchers = children["halves_bits"], ("grouped_allgather", "alltoall", "allgather")
    cases = [("fp64", 10), ("fp32", 2)]
    dues = runs.curves([Job(child, {}, RULES, precision, steps) for precision, steps in cases])
    assert dues[0][-1].loss < 0.95 * dues[0][0].loss
    jobs = [Job(child, {"expert": 2, "dispatcher": name}, RULES, *case) for case in cases for name in dispatchers]
    answers = run_on_ranks(runs.curves, 2, jobs)[0]
    for job, rows in zip(jobs, answers, strict=True):
        due = dues[[precision for precision, _ in cases].index(job.precision)]
        assert not _far(rows, due, *BOUNDS[job.precision]), job
        assert rows[0].dispatched == due[0].dispatched, "the same experts are counted"


def test_a_tied_head_trains_the_same_on_every_layout(tied_parent: Path) -> None:
    """Under pipeline parallelism the two copies of the embedding must get the sum of both gradients, counted once."""
    (due,) = runs.curves([Job(tied_parent, {}, RULES, "fp64", 6)])
    layouts = {"PP2": {"pipeline": 2}, "TP2 EP2": {"tensor": 2, "expert": 2}, "DP2": {}}
    found = run_on_ranks(runs.curves, 2, [Job(tied_parent, layout, RULES, "fp64", 6) for layout in layouts.values()])[0]
    for name, rows in zip(layouts, found, strict=True):
        assert not _far(rows, due, 1e-8, 1e-8), name


def test_recomputed_activations_change_nothing(parent: Path, reference: dict[str, list[Row]]) -> None:
    """Nor does what the router counts: it is asked twice for every token."""
    for recompute in ("selective", "full"):
        (rows,) = runs.curves([Job(parent, {"recompute": recompute}, RULES, "fp64", 4)])
        assert not _far(rows, reference["fp64"][:4], 1e-12, 1e-12), recompute
        assert [row.dispatched for row in rows] == [row.dispatched for row in reference["fp64"][:4]], recompute


def test_every_dispatched_token_is_counted(reference: dict[str, list[Row]]) -> None:
    """4 micro-batches of 64 tokens, masked or not, visit 8 experts each in both layers."""
    for row in reference["fp32"]:
        assert [sum(layer) for layer in row.dispatched] == [4 * 64 * 8] * 2
