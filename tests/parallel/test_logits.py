"""Logits of the engine equal computations that share no code with it, at every expert-parallel size and by every dispatcher."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import closed_form
from tests.commands import moexpand
from tests.parallel import runs
from tests.parallel.conftest import PLACEMENTS
from tests.parents import make_parent
from tests.processes import run_on_ranks

TOKENS = np.random.default_rng(5).integers(0, 256, (4, 20))
DISPATCHERS = ("alltoall", "allgather", "grouped_allgather")


def _transformers(folder: Path, tokens: np.ndarray = TOKENS, **options: Any) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.double().numpy()


def _distance(found: np.ndarray, due: np.ndarray) -> float:
    assert found.shape == due.shape
    return float(np.abs(found - due).max())


@pytest.fixture(scope="module")
def closed_forms(parent: Path) -> dict[str, np.ndarray]:
    """What children compute, from the parent's tensors in float64."""
    return {name: closed_form.logits(parent, TOKENS, closed_form.grouped_pick(name)) for name in PLACEMENTS}


def test_a_parent_of_128_experts_computes_what_transformers_computes(parent: Path) -> None:
    (found,) = runs.logits([(parent, {})], TOKENS)
    assert _distance(found, _transformers(parent)) <= 1e-5


def test_a_tied_head_and_unnormalised_weights_compute_what_transformers_computes(tied_parent: Path) -> None:
    (found,) = runs.logits([(tied_parent, {})], TOKENS)
    assert _distance(found, _transformers(tied_parent)) <= 1e-5


@pytest.mark.parametrize("hub_form", [True, False])
def test_the_command_reads_both_forms_of_config_json(tmp_path: Path, hub_form: bool) -> None:
    from moexpand.cli import main

    folder = make_parent(tmp_path / "parent", experts=128, seed=3, hub_form=hub_form)
    np.save(tmp_path / "tokens.npy", TOKENS)
    assert main(["logits", f"checkpoint={folder}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}"]) == 0
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    assert _distance(found, _transformers(folder)) <= 1e-5


def test_transformers_with_the_childs_own_code_equals_the_engine(children: dict[str, Path]) -> None:
    found = runs.logits([(children[name], {}) for name in PLACEMENTS], TOKENS)
    for name, ours in zip(PLACEMENTS, found, strict=True):
        assert _distance(ours, _transformers(children[name], trust_remote_code=True)) <= 1e-5


def _check_children(children: dict[str, Path], closed_forms: dict[str, np.ndarray], size: int) -> None:
    cases = [(name, {"expert": size, "dispatcher": dispatcher}) for name in PLACEMENTS for dispatcher in DISPATCHERS]
    jobs = [(children[name], layout) for name, layout in cases]
    answers = [runs.logits(jobs, TOKENS)] if size == 1 else run_on_ranks(runs.logits, size, jobs, TOKENS)
    for rank, answer in enumerate(answers):
        for (name, layout), found in zip(cases, answer, strict=True):
            distance = _distance(found, closed_forms[name])
            assert distance <= 1e-5, (rank, name, layout, distance)


def test_a_child_is_the_closed_form_on_one_rank(children: dict[str, Path], closed_forms: dict[str, np.ndarray]) -> None:
    _check_children(children, closed_forms, 1)
    assert _distance(closed_forms["halves_bits"], closed_forms["halves_tile"]) > 0.1, "the bound tells placements apart"


def test_a_child_is_the_closed_form_at_expert_parallel_size_2(
    children: dict[str, Path], closed_forms: dict[str, np.ndarray]
) -> None:
    _check_children(children, closed_forms, 2)


def test_a_child_is_the_closed_form_at_expert_parallel_size_4(
    children: dict[str, Path], closed_forms: dict[str, np.ndarray]
) -> None:
    _check_children(children, closed_forms, 4)


def test_tensor_and_pipeline_stages_compute_the_same_logits(
    children: dict[str, Path], closed_forms: dict[str, np.ndarray], tied_parent: Path
) -> None:
    child = children["halves_bits"]
    layouts = ({"tensor": 2}, {"tensor": 2, "expert": 2}, {"pipeline": 2})
    jobs = [(child, layout) for layout in layouts] + [(tied_parent, layout) for layout in layouts]
    due = [closed_forms["halves_bits"]] * 3 + [_transformers(tied_parent)] * 3
    for rank, answer in enumerate(run_on_ranks(runs.logits, 2, jobs, TOKENS)):
        for (_, layout), found, expected in zip(jobs, answer, due, strict=True):
            assert (found is None) == ("pipeline" in layout and rank == 0)
            if found is not None:
                assert _distance(found, expected) <= 1e-5, layout


KINDS: tuple[dict[str, Any], ...] = (
    {"context": 2},
    {"context": 2, "expert": 2, "dispatcher": "grouped_allgather"},
    {"expert_tensor": 2},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2, "interleave": 2},
    {"pipeline": 2, "interleave": 2, "recompute": "full"},
)
"""Every way of splitting a model, on two ranks."""


def routed_logits(folder: Path, routes: np.ndarray | None) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Logits [B, S, V] on every kind of layout in float64 and the routes [B, S, layers, K] that they took, or those given."""
    from moexpand.parallel.batch import PackedBatch

    found = []
    for layout in KINDS:
        with runs.engine(folder, layout, {}, "fp64") as built:
            batches = [PackedBatch.from_sequences(torch.from_numpy(row[None])) for row in TOKENS]
            outputs, recorded = built.logits(batches, None if routes is None else list(routes), record=routes is None)
            whole = np.stack([each.numpy() for each in outputs]) if outputs else None
            found.append((whole, None if recorded is None else np.stack(recorded)))
    return found


def test_every_kind_of_layout_computes_the_closed_form_by_its_own_routes_and_by_given_ones(deep_child: Path) -> None:
    """Routes are whole on every rank, logits on every rank of the last stage."""
    shape = runs.shape_of(deep_child)
    members = np.arange(shape.num_experts).reshape(shape.router_n_groups, -1)
    given = np.random.default_rng(3).integers(0, members.shape[1], (*TOKENS.shape, shape.num_hidden_layers, len(members)))
    given += members[:, 0]
    chosen: dict[int, list[list[int]]] = {layer: [] for layer in range(shape.num_hidden_layers)}

    def own(layer: int) -> closed_form.Pick:
        def pick(z_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            best = members[np.arange(len(members)), z_E[members].argmax(-1)]
            chosen[layer].append(best.tolist())
            return best, closed_form.softmax(z_E[best])

        return pick

    def told(layer: int) -> closed_form.Pick:
        rows = iter(given[:, :, layer].reshape(-1, len(members)))

        def pick(z_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row = next(rows)
            return row, closed_form.softmax(z_E[row])

        return pick

    layers = range(shape.num_hidden_layers)
    due = closed_form.logits(deep_child, TOKENS, [own(layer) for layer in layers])
    forced = closed_form.logits(deep_child, TOKENS, [told(layer) for layer in layers])
    due_routes = np.stack([np.array(chosen[layer]).reshape(*TOKENS.shape, -1) for layer in layers], axis=2)
    for routes, expected in ((None, due), (given, forced)):
        for rank, answer in enumerate(run_on_ranks(routed_logits, 2, deep_child, routes)):
            for layout, (found, recorded) in zip(KINDS, answer, strict=True):
                assert (found is None) == ("pipeline" in layout and rank == 0), layout
                if found is not None:
                    assert _distance(found, expected) <= 1e-9, layout
                if routes is None:
                    assert recorded is not None
                    assert np.array_equal(np.sort(recorded, axis=-1), np.sort(due_routes, axis=-1)), layout
    assert _distance(due, forced) > 0.1, "the routes matter"


def test_the_command_on_two_ranks_writes_the_closed_form(
    children: dict[str, Path], closed_forms: dict[str, np.ndarray], tmp_path: Path
) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    done = moexpand(
        "logits",
        f"checkpoint={children['halves_tile']}",
        f"tokens={tmp_path / 'tokens.npy'}",
        f"out={tmp_path / 'out.npy'}",
        "processes=2",
        "parallel.expert=2",
    )
    assert done.returncode == 0, done.stderr
    assert _distance(np.load(tmp_path / "out.npy"), closed_forms["halves_tile"]) <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "tokens.npy"], "nothing else is left behind"
