"""Twenty steps of training are the same on every layout.

With balance loss, z-loss, the straight-through gradient and masks that differ from micro-batch to micro-batch and so from rank
to rank: what a layout gets wrong in a sum, a mean or a reduction shows here. In float64 nothing is left to rounding.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel import runs
from tests.parallel.layouts import FOUR, GROUPED_FOUR, GROUPED_TWO, TWO
from tests.parallel.runs import Job, Row
from tests.processes import run_on_ranks

RULES = {"gradient": "ste", "balance_coefficient": 1e-2, "z_loss_coefficient": 1e-3}
BOUNDS = {"fp32": (2e-5, 1e-4), "fp64": (1e-8, 1e-8)}
GROUPED_RULES = RULES | {"group_coefficient": 1e-2}
REPLAYED = (1e-6, 1e-5)
"""fp32 with the routes of the one-rank run."""
STEPS = {"fp32": 20, "fp64": 4}


def _far(found: list[Row], due: list[Row], loss: float, grad_norm: float) -> list[str]:
    """What lies outside the bounds, in words; empty when the curves are the same."""
    wrong = []
    assert len(found) == len(due)
    for step, (one, other) in enumerate(zip(found, due, strict=True)):
        pairs = [("loss", one.loss, other.loss, loss), ("grad_norm", one.grad_norm, other.grad_norm, grad_norm)]
        for name in ("balance", "group_balance", "z_loss"):
            for layer, (mine, theirs) in enumerate(zip(getattr(one, name), getattr(other, name), strict=True)):
                pairs.append((f"{name} of layer {layer}", mine, theirs, 10 * grad_norm))
        wrong += [f"step {step} {name}: {a!r} {b!r}" for name, a, b, bound in pairs if abs(a - b) > bound * abs(b)]
        if one.tokens != other.tokens:
            wrong.append(f"step {step} tokens: {one.tokens} {other.tokens}")
    return wrong


def _jobs(folder: Path, layouts: dict[str, dict[str, Any]], precisions: tuple[str, ...] = ("fp32", "fp64")) -> list[Job]:
    return [Job(folder, layout, RULES, precision, STEPS[precision]) for precision in precisions for layout in layouts.values()]


@pytest.fixture(scope="module")
def reference(deep_parent: Path) -> dict[str, list[Row]]:
    """One rank."""
    found = runs.curves([Job(deep_parent, {}, RULES, precision) for precision in BOUNDS])
    return dict(zip(BOUNDS, found, strict=True))


@pytest.fixture(scope="module")
def child_reference(deep_child: Path) -> tuple[list[Row], runs.Recording]:
    """One rank, the 512-expert child, with its routes."""
    return runs.recorded_curve(Job(deep_child, {}, GROUPED_RULES, "fp32", STEPS["fp32"]))


def test_the_loss_falls_by_five_percent_and_precisions_agree(
    reference: dict[str, list[Row]], child_reference: tuple[list[Row], runs.Recording]
) -> None:
    """A curve that stood still would hide a wrong gradient."""
    for rows in (*reference.values(), child_reference[0]):
        assert rows[-1].loss < 0.95 * rows[0].loss
        assert rows[16].loss < 0.95 * rows[0].loss, "the same micro-batches as in step 0"
        assert len({row.tokens for row in rows}) > 1, "masks differ from step to step"
        assert min(rows[0].balance) > 1.0
    assert not _far(reference["fp32"], reference["fp64"], 2e-5, 1e-4)


@pytest.mark.layouts
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "layouts"), [(2, TWO), (4, FOUR)], ids=["two ranks", "four ranks"])
@pytest.mark.parametrize("precision", list(BOUNDS))
def test_curves_are_the_same_on_every_layout(
    deep_parent: Path, reference: dict[str, list[Row]], size: int, layouts: dict[str, dict[str, Any]], precision: str
) -> None:
    jobs = _jobs(deep_parent, layouts, (precision,))
    answers = run_on_ranks(runs.curves, size, jobs, timeout=800)
    assert all(answer == answers[0] for answer in answers), "every rank reports the same numbers"
    wrong = {
        name: far
        for name, rows in zip(layouts, answers[0], strict=True)
        if (far := _far(rows, reference[precision][: STEPS[precision]], *BOUNDS[precision]))
    }
    assert not wrong, {name: far[:3] for name, far in wrong.items()}


@pytest.mark.layouts
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "layouts"), [(2, GROUPED_TWO), (4, GROUPED_FOUR)], ids=["two ranks", "four ranks"])
def test_with_replayed_routes_a_grouped_child_trains_the_same_by_every_dispatcher(
    deep_child: Path, child_reference: tuple[list[Row], runs.Recording], size: int, layouts: dict[str, dict[str, Any]]
) -> None:
    """Without replay a near tie among 64 experts may go another way in fp32, and then all that follows."""
    due, routes = child_reference
    jobs = [Job(deep_child, layout, GROUPED_RULES, "fp32", STEPS["fp32"], routes) for layout in layouts.values()]
    found = run_on_ranks(runs.curves, size, jobs, timeout=800)[0]
    wrong = {name: far for name, rows in zip(layouts, found, strict=True) if (far := _far(rows, due, *REPLAYED))}
    assert not wrong, {name: far[:3] for name, far in wrong.items()}
    assert all(row.dispatched == other.dispatched for rows in found for row, other in zip(rows, due, strict=True))


SOME = {name: TWO[name] for name in ("EP2 allgather", "DP2 overlap", "PP2 interleaved", "TP2 EP2", "ETP2", "CP2 EP2")}


@pytest.mark.layouts
def test_with_replayed_routes_a_parent_trains_the_same_on_every_kind_of_layout(
    deep_parent: Path, reference: dict[str, list[Row]]
) -> None:
    """Rounding grows from step to step, as AdamW divides small gradients by their own size."""
    due, routes = runs.recorded_curve(Job(deep_parent, {}, RULES, "fp32", STEPS["fp32"]))
    assert due == reference["fp32"], "recording changes nothing"
    jobs = [Job(deep_parent, layout, RULES, "fp32", STEPS["fp32"], routes) for layout in SOME.values()]
    found = run_on_ranks(runs.curves, 2, jobs)[0]
    for steps, bounds in ((12, (1e-6, 1e-4)), (STEPS["fp32"], (2e-6, 1e-4))):
        far = {name: _far(rows[:steps], due[:steps], *bounds) for name, rows in zip(SOME, found, strict=True)}
        assert not any(far.values()), {name: lines[:3] for name, lines in far.items()}
    assert all(row.dispatched == other.dispatched for rows in found for row, other in zip(rows, due, strict=True))


STATEFUL = RULES | {"gradient": "default_vector", "scope": "global", "group_coefficient": 1e-2, "bias_rate": 1e-4}
"""What a step leaves to the next: default vectors, loads, a selection bias."""


@pytest.mark.layouts
def test_what_steps_leave_to_the_next_is_the_same_on_every_layout(deep_child: Path) -> None:
    """Six steps in float64, the moving averages and the loads in use from the second on."""
    shape = {"selection_bias": True}
    due, plain = runs.curves(
        [Job(deep_child, {}, STATEFUL, "fp64", 6, shape=shape), Job(deep_child, {}, RULES, "fp64", 6, shape=shape)]
    )
    assert _far(due[2:], plain[2:], 1e-8, 1e-8), "these rules are another way of learning"
    layouts = {
        "EP2": {"expert": 2, "dispatcher": "grouped_allgather"},
        "alltoall": {"expert": 2},
        "ETP2": {"expert_tensor": 2},
        "TP2 EP2": {"tensor": 2, "expert": 2, "dispatcher": "grouped_allgather"},
        "CP2 EP2 recomputed": {"context": 2, "expert": 2, "recompute": "full"},
        "PP2 interleaved": {"pipeline": 2, "interleave": 2, "recompute": "selective"},
        "DP2": {},
        "DP2 overlap": {"overlap": True},
        "EP2 overlap": {"expert": 2, "dispatcher": "grouped_allgather", "overlap": True},
    }
    found = run_on_ranks(
        runs.curves, 2, [Job(deep_child, layout, STATEFUL, "fp64", 6, shape=shape) for layout in layouts.values()]
    )
    wrong = {name: far for name, rows in zip(layouts, found[0], strict=True) if (far := _far(rows, due, 1e-8, 1e-8))}
    assert not wrong, {name: far[:3] for name, far in wrong.items()}


@pytest.mark.layouts
def test_bf16_layouts_differ_less_than_bf16_differs_from_fp32(deep_parent: Path, reference: dict[str, list[Row]]) -> None:
    """bf16 keeps 8 bits: a layout that sums in another order rounds activations otherwise, and a near tie of two experts may tip.

    Both distances are effects of the same rounding, so the larger of the two must be that of the number format itself.
    """
    (due,) = runs.curves([Job(deep_parent, {}, RULES, "bf16", 20)])

    def distance(rows: list[Row]) -> float:
        return max(abs(one.loss - two.loss) / two.loss for one, two in zip(rows, due, strict=True))

    rounding = distance(reference["fp32"])
    assert 1e-5 < rounding < 5e-2
    assert due[-1].loss < 0.95 * due[0].loss
    layouts = {"EP2": {"expert": 2}, "TP2 EP2": {"tensor": 2, "expert": 2}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}}
    found = run_on_ranks(runs.curves, 2, [Job(deep_parent, layout, RULES, "bf16", 20) for layout in layouts.values()])[0]
    distances = {name: distance(rows) for name, rows in zip(layouts, found, strict=True)}
    assert max(distances.values()) <= rounding, (distances, rounding)


def test_a_tied_head_trains_the_same_on_every_layout(tied_parent: Path) -> None:
    """Under pipeline parallelism the two copies of the embedding must get the sum of both gradients, counted once."""
    (due,) = runs.curves([Job(tied_parent, {}, RULES, "fp64", 6)])
    layouts = {"PP2": {"pipeline": 2}, "TP2 EP2": {"tensor": 2, "expert": 2}, "DP2": {}, "CP2": {"context": 2}}
    found = run_on_ranks(runs.curves, 2, [Job(tied_parent, layout, RULES, "fp64", 6) for layout in layouts.values()])[0]
    for name, rows in zip(layouts, found, strict=True):
        assert not _far(rows, due, 1e-8, 1e-8), name


def test_recomputed_activations_change_nothing(deep_parent: Path, reference: dict[str, list[Row]]) -> None:
    """Nor does what the router counts: it is asked twice for every token."""
    for recompute in ("selective", "full"):
        (rows,) = runs.curves([Job(deep_parent, {"recompute": recompute}, RULES, "fp64", 4)])
        assert not _far(rows, reference["fp64"][:4], 1e-12, 1e-12), recompute
        assert [row.dispatched for row in rows] == [row.dispatched for row in reference["fp64"][:4]], recompute


def test_every_dispatched_token_is_counted(reference: dict[str, list[Row]]) -> None:
    """4 micro-batches of 64 tokens, masked or not, visit 8 experts each in all four layers."""
    for row in reference["fp32"]:
        assert [sum(layer) for layer in row.dispatched] == [4 * 64 * 8] * 4
