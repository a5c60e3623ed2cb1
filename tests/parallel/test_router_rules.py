"""What moves a router: its own learning rate, freezing, a selection bias against the load; a resumed run keeps all of it.

Legend: T tokens, E experts, G groups, M = E / G, K experts a token visits, L layers.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.parallel.optimizer import Rates
from tests import closed_form
from tests.parallel import runs
from tests.parallel.legs import Leg, legs
from tests.parents import TINY, make_parent
from tests.processes import run_on_ranks

EXPERTS, TOP_K, GROUPS, LAYERS = 8, 4, 2, 2
GATES = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)}
LOSSES = {"balance_coefficient": 0.05, "group_coefficient": 0.03, "z_loss_coefficient": 0.01}
SHAPE = {"router_n_groups": GROUPS, "selection_bias": True}
STATEFUL = LOSSES | {"gradient": "default_vector", "scope": "global", "bias_rate": 0.02}
"""All that a step leaves to the next."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TINY | {"top_k": TOP_K, "layers": LAYERS, "kv_heads": 2, "vocab": 256, "max_shard_size": "50KB"}
    return make_parent(tmp_path_factory.mktemp("rules") / "tiny", **shape)


def _weights(built: Any) -> dict[str, np.ndarray]:
    return {name: value.double().numpy().copy() for name, value in built.tensors() if not name.endswith("bias")}


def stayed(folder: Path, jobs: list[tuple[dict[str, Any], str, bool]]) -> list[set[str]]:
    """Names of the weights that two steps leave bitwise as they were, for each (layout, precision, frozen)."""
    found = []
    for layout, precision, frozen in jobs:
        with runs.engine(folder, layout, STATEFUL | {"freeze": frozen}, precision, SHAPE) as built:
            runs.prepare(built, frozen_routers=frozen)
            before = _weights(built)
            runs.train(built, 0, 2, lr=1e-2)
            found.append({name for name, values in _weights(built).items() if np.array_equal(values, before[name])})
    return found


def test_frozen_routers_stay_bitwise_while_all_else_moves(tiny: Path) -> None:
    """Neither the language model's loss, nor auxiliary losses, nor weight decay reach them."""
    jobs = [({}, "fp32", True), ({}, "fp32", False), ({"overlap": True}, "bf16", True)]
    for answer in (stayed(tiny, jobs[:2]), *run_on_ranks(stayed, 2, tiny, jobs)):
        assert answer == [GATES, set(), GATES][: len(answer)]


def test_the_routers_learn_at_their_own_rate(tiny: Path) -> None:
    """Adam's first step is w (1 - rate * decay) - rate * g / (|g| + eps), norms without decay; the routers' rate is theirs."""
    with runs.engine(tiny, {}, LOSSES | {"gradient": "ste"}, "fp64", SHAPE) as built:
        gradients, _ = runs.gradients(runs.prepare(built, clip_grad=0.0), runs.step_arrays(0))
    for lr, router_lr in ((1e-3, 0.0), (1e-3, 2e-4), (5e-3, 2e-4), (1e-3, 6e-4), (0.0, 6e-4), (2e-3, None)):
        with runs.engine(tiny, {}, LOSSES | {"gradient": "ste"}, "fp64", SHAPE) as built:
            runs.prepare(built, clip_grad=0.0, weight_decay=0.1, eps=1e-8)
            before = _weights(built)
            built.step(runs.device_batches(built, 0), Rates(lr, routers=router_lr))
            after = _weights(built)
        assert gradients.keys() == after.keys()
        for name, g in gradients.items():
            rate = lr if router_lr is None or name not in GATES else router_lr
            due = before[name] * (1 - rate * 0.1 * (g.ndim == 2)) - rate * g / (np.abs(g) + 1e-8)
            assert np.array_equal(after[name], before[name]) == (rate == 0), (name, lr, router_lr)
            assert np.abs(after[name] - due).max() <= 1e-10 * rate, (name, lr, router_lr)


def test_the_routers_rate_warms_up_linearly() -> None:
    from moexpand.conf.train_schema import Router
    from moexpand.train.schedules import router_multiplier

    def first_six(**keys: Any) -> list[float]:
        return [router_multiplier(Router(**keys), step) for step in range(6)]

    assert first_six() == [1.0] * 6
    assert first_six(lr_multiplier=2.0, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert first_six(lr_multiplier=0.5, warmup_steps=1) == [0.5] * 6
    assert first_six(lr_multiplier=2.0, warmup_steps=4, freeze=True) == [0.0] * 6


def _moved(bias_LE: np.ndarray, loads_LE: np.ndarray, rate: float) -> np.ndarray:
    """The selection bias after a step, in fp32: by the rate, up below the mean load of the group and down above."""
    loads_LGM = loads_LE.reshape(LAYERS, GROUPS, -1)
    return bias_LE + np.float32(rate) * np.sign(loads_LGM.mean(-1, keepdims=True) - loads_LGM).reshape(bias_LE.shape).astype("f4")


def _biases(built: Any) -> np.ndarray:
    return np.stack([router.selection_bias.numpy() for router in built.routers])


@pytest.mark.parametrize("rate", [1e-3, 0.25])
def test_the_selection_bias_moves_by_its_rate_against_the_load_of_the_group(tiny: Path, rate: float) -> None:
    """Exactly, from step to step, and by what was dispatched: at last by replayed routes, with the mean load on three experts."""
    row = np.array([[0, 1, 4, 5]] * 32 + [[0, 2, 4, 6]] * 16 + [[0, 3, 4, 6]] * 16)
    routes = [np.repeat(row[:, None], LAYERS, axis=1)] * 4
    with runs.engine(tiny, {}, {"bias_rate": rate}, shape=SHAPE) as built:
        runs.prepare(built)
        bias_LE = np.zeros((LAYERS, EXPERTS), dtype="f4")
        for step in range(4):
            report = built.step(runs.device_batches(built, step), 1e-2)
            bias_LE = _moved(bias_LE, report.dispatched.numpy(), rate)
            assert np.array_equal(_biases(built), bias_LE), step
        report = built.step(runs.device_batches(built, 0), 0.0, routes=routes)
        assert report.dispatched.tolist() == [[256, 128, 64, 64, 256, 128, 128, 0]] * LAYERS
        by_hand = np.float32(rate) * np.array([-1, 0, 1, 1, -1, 0, 0, 1], dtype="f4")
        assert np.array_equal(_biases(built), bias_LE + by_hand)


@pytest.mark.parametrize(("scoring", "renormalise"), [("softmax", True), ("softmax", False), ("sigmoid", True)])
def test_the_selection_bias_changes_the_choice_alone(tiny: Path, scoring: str, renormalise: bool) -> None:
    """The best scores + bias of every group are visited, with weights from the scores as if there were no bias."""
    generator = np.random.default_rng(3)
    tokens_BS = generator.integers(0, 256, (2, 12))
    biases_LE = generator.normal(0, 0.2, (LAYERS, EXPERTS)).astype("f4")

    def picks(bias_E: np.ndarray, chosen: list[np.ndarray]) -> closed_form.Pick:
        def pick(z_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scores_E = closed_form.softmax(z_E) if scoring == "softmax" else 1 / (1 + np.exp(-z_E))
            best_Gk = np.argsort(-(scores_E + bias_E).reshape(GROUPS, -1), axis=-1)[:, : TOP_K // GROUPS]
            chosen.append((best_Gk + np.array([[0], [EXPERTS // GROUPS]])).ravel())
            weights_K = scores_E[chosen[-1]]
            return chosen[-1], weights_K / weights_K.sum() if renormalise else weights_K

        return pick

    due_routes: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    due = closed_form.logits(tiny, tokens_BS, [picks(*pair) for pair in zip(biases_LE, due_routes, strict=True)])
    plain = closed_form.logits(tiny, tokens_BS, picks(np.zeros(EXPERTS), []))

    from moexpand.parallel.batch import PackedBatch

    shape = SHAPE | {"scoring_func": scoring, "norm_topk_prob": renormalise}
    with runs.engine(tiny, {}, {}, "fp64", shape) as built:
        for router, bias_E in zip(built.routers, biases_LE, strict=True):
            router.selection_bias.copy_(torch.from_numpy(bias_E))
        logits, routes = built.logits([PackedBatch.from_sequences(torch.from_numpy(tokens_BS))], record=True)
    assert routes is not None
    assert np.array_equal(routes[0], np.stack(due_routes, axis=1).reshape(routes[0].shape))
    assert runs.relative(logits[0].numpy().reshape(due.shape), due) < 1e-12
    assert runs.relative(plain, due) > 0.05, "the bias matters"


def balanced(folder: Path, jobs: list[tuple[dict[str, Any], float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Loads [steps, L, E] and the last biases of 16 steps at each (layout, rate), from embeddings that all lean to one side."""
    found = []
    for layout, rate in jobs:
        rules, shape = {"gradient": "ste", "bias_rate": rate}, SHAPE | {"scoring_func": "sigmoid"}
        with runs.engine(folder, layout, rules, "fp64", shape) as built:
            built.stages[0].embedding.word_embeddings.weight.data += 0.2
            rows = runs.train(runs.prepare(built), 0, 16)
            found.append((np.array([row.dispatched for row in rows]), _biases(built)))
    return found


def _variations(loads_SLE: np.ndarray) -> np.ndarray:
    """Standard deviation of the load over its mean inside groups, mean over groups and layers [steps]."""
    loads_SLGM = loads_SLE.reshape(len(loads_SLE), LAYERS, GROUPS, -1)
    return np.asarray((loads_SLGM.std(-1) / loads_SLGM.mean(-1)).mean((1, 2)))


def test_the_selection_bias_evens_the_load_out_and_equally_on_every_layout(tiny: Path) -> None:
    (loads, biases), (skewed, _) = balanced(tiny, [({}, 0.04), ({}, 0.0)])
    due, without = _variations(loads), _variations(skewed)
    assert due[0] == without[0] > 0.5
    assert due[-4:].mean() < 0.5 * due[:4].mean(), due
    assert without[-4:].min() > 0.8 * without[0], without
    layouts = [{"expert": 2}, {}, {"tensor": 2}]
    for answer in run_on_ranks(balanced, 2, tiny, [(layout, 0.04) for layout in layouts]):
        for layout, found in zip(layouts, answer, strict=True):
            assert np.array_equal(found[0], loads), layout
            assert np.array_equal(found[1], biases), layout


def test_default_vectors_are_the_means_of_what_the_experts_put_out(tiny: Path) -> None:
    """With the weights of the forward pass, though the optimiser has moved them when the averages are taken."""
    heard: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in range(LAYERS)}
    with runs.engine(tiny, {}, STATEFUL | {"default_decay": 0.75}, "fp64", SHAPE) as built:
        runs.prepare(built)
        for router in built.routers:
            router.register_forward_hook(
                lambda router, given, choice: heard[router.layer].append((given[0].numpy(force=True), choice.chosen.numpy()))
            )
        before = _weights(built)
        built.step(runs.device_batches(built, 0), 0.1)
        found = [layer.default_vectors.vectors.numpy().copy() for layer in built.moe_layers]
        after = _weights(built)
    for layer in range(LAYERS):
        x_TH, chosen_TK = (np.concatenate(parts) for parts in zip(*heard[layer], strict=True))
        for expert in range(EXPERTS):
            matrices = (f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight" for name in ("gate", "up", "down"))
            gate, up, down = (before[name] for name in matrices)
            own = x_TH[(chosen_TK == expert).any(1)]
            assert len(own)
            opened = own @ gate.T
            due = (opened / (1 + np.exp(-opened)) * (own @ up.T)) @ down.T
            assert runs.relative(found[layer][expert], due.mean(0)) < 1e-12, (layer, expert)
            moved = after[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
            assert runs.relative(moved, down) > 1e-2, "the bound tells the weights apart"


BUFFERS = ("router.previous", "router.selection_bias", "default_vectors.total")


def _halves(saved: Path, *run: Any) -> list[Leg]:
    """Seven steps in one go, three that are saved, four that go on from there; after an odd number no bias is 0 again."""
    whole, first, second = Leg(*run, 0, 7), Leg(*run, 0, 3, save=saved), Leg(*run, 3, 7, load=saved)
    return [replace(leg, rules=STATEFUL, shape=SHAPE) for leg in (whole, first, second)]


def _check_halves(straight: Any, resumed: Any) -> None:
    assert (resumed[0], resumed[1].keys()) == (straight[0][3:], straight[1].keys())
    for name, values in straight[1].items():
        assert np.array_equal(resumed[1][name], values), name
    for name in BUFFERS:
        assert len(np.unique(straight[1][f"decoder.layers.0.mlp.{name}"])) > 1, "it is in use"


def test_a_run_of_two_halves_is_bitwise_the_straight_one(tiny: Path, tmp_path: Path) -> None:
    """Default vectors, loads of the step before and selection bias go on as they were; any of them would be missed."""
    several = _halves(tmp_path / "one", tiny, {}, "fp32")
    straight, _, resumed, *others = legs(several + [replace(several[-1], forget=name) for name in BUFFERS])
    _check_halves(straight, resumed)
    for name, (rows, _) in zip(BUFFERS, others, strict=True):
        assert rows != straight[0][3:], name


def test_so_it_is_on_two_ranks(tiny: Path, tmp_path: Path) -> None:
    jobs = {"EP2": ({"expert": 2}, "fp32"), "bf16": ({"expert": 2}, "bf16"), "DP2": ({}, "fp32")}
    several = [leg for name, run in jobs.items() for leg in _halves(tmp_path / name, tiny, *run)]
    for answer in run_on_ranks(legs, 2, several):
        for first in range(0, len(several), 3):
            _check_halves(answer[first], answer[first + 2])
