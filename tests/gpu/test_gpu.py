"""What only a GPU can show (`make gpu-check`): one rank computes there what it computes on a CPU, and the layer's bench runs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moexpand.parallel.expert_mlp import expert_mlp
from moexpand.parallel.rows import Rows
from tests.commands import ROOT
from tests.parallel.test_experts import HIDDEN, INNER, by_loop, choices
from tests.parents import make_child, make_parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

FP32 = 5e-5
"""Relative distance of fp32 on a GPU from float64, in norm: sums of a few hundred terms in another order."""


def _python(*words: object, gpu: bool = True) -> str:
    environment = os.environ if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _distances(found: Path, due: Path) -> dict[str, float]:
    """Norm of the difference over the norm that is due, by figure; what is due as zero must be zero."""
    mine, theirs = np.load(found), np.load(due)
    assert mine.files == theirs.files
    distances = {}
    for name in theirs.files:
        difference, norm = np.linalg.norm(mine[name].astype(float) - theirs[name]), np.linalg.norm(theirs[name].astype(float))
        distances[name] = float(difference / norm if norm else np.inf if difference else 0.0)
    return distances


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    parent = make_parent(folder / "parent", experts=32, hidden=32, intermediate=16, head_dim=8, seed=2)
    return make_child(parent, folder / "child", placement="halves_bits", num_experts=128)


@pytest.fixture(scope="module")
def exact(child: Path) -> Path:
    """float64 on the CPU, whose routes all others follow."""
    _python("-m", "tests.gpu.figures", child, child.with_name("exact.npz"), "fp64", gpu=False)
    return child.with_name("exact.npz")


def test_loss_logits_and_gradients_in_fp32_are_those_of_the_cpu(child: Path, exact: Path, tmp_path: Path) -> None:
    _python("-m", "tests.gpu.figures", child, tmp_path / "gpu.npz", "fp32", exact)
    distances = _distances(tmp_path / "gpu.npz", exact)
    assert max(distances.values()) <= FP32, max(distances, key=lambda name: distances[name])


def test_in_bf16_the_gpu_is_no_further_from_float64_than_the_cpu(child: Path, exact: Path, tmp_path: Path) -> None:
    """Both round to 8 bits after every operation, in sums of other orders: about as far in the median, at most twice at worst."""
    for name, gpu in (("cpu", False), ("gpu", True)):
        _python("-m", "tests.gpu.figures", child, tmp_path / f"{name}.npz", "bf16", exact, gpu=gpu)
    theirs, mine = (np.array([*_distances(tmp_path / f"{name}.npz", exact).values()]) for name in ("cpu", "gpu"))
    assert mine.max() <= 2 * theirs.max()
    assert np.median(mine) <= 1.5 * np.median(theirs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("load", ["even", "skewed", "same"])
def test_grouped_experts_are_the_loop_in_float64(load: str, dtype: torch.dtype, bound: float) -> None:
    """Forward and backward; under `same` four experts have all tokens and the others none."""
    generator = np.random.default_rng(0)
    chosen = choices(generator, 48, 32, 4, load)
    shapes = ((48, HIDDEN), (48, 4), (32, 2 * INNER, HIDDEN), (32, HIDDEN, INNER))
    values = [torch.from_numpy(generator.standard_normal(shape)).to(dtype) for shape in shapes]
    values[1] = values[1].float()  # the router's weights are fp32 or wider
    upstream = torch.from_numpy(generator.standard_normal((48, HIDDEN))).to(dtype)
    x, weights, gate_up, down = leaves = [value.cuda().requires_grad_() for value in values]
    y = expert_mlp(x, weights, gate_up, down, Rows.sort(chosen.cuda(), 32, down[0].numel()))
    y.backward(upstream.cuda())
    exact = [value.double().requires_grad_() for value in values]
    due = by_loop(*exact, chosen)
    due.backward(upstream.double())
    for found, expected in [(y, due), *((mine.grad, other.grad) for mine, other in zip(leaves, exact, strict=True))]:
        assert found is not None
        assert expected is not None
        assert (found.cpu().double() - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("per_group", [1, 2])
def test_equal_scores_go_to_the_lowest_index_as_on_the_cpu(per_group: int) -> None:
    """The GPU's path of `select_experts` is another one."""
    from moexpand.base.routing import select_experts

    scores = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (256, 64)) / 4.0)
    for groups in (1, 8):
        due = select_experts(scores, per_group * groups, groups)
        assert torch.equal(select_experts(scores.cuda(), per_group * groups, groups).cpu(), due)


def test_one_rank_computes_the_same_whatever_dispatcher_is_named(child: Path) -> None:
    from moexpand.parallel import cpu
    from moexpand.parallel.batch import PackedBatch
    from tests.gpu.figures import RULES
    from tests.parallel import runs

    losses = []
    for dispatcher in ("alltoall", "allgather", "grouped_allgather"):
        with runs.engine(child, {"dispatcher": dispatcher}, RULES) as built:
            runs.prepare(built)
            batches = [PackedBatch.from_arrays(runs.micro_batch(0), cpu.device())]
            losses.append([built.step(batches, 1e-3).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bench_of_the_layer_runs_there(dtype: str) -> None:
    """It refuses to time experts that do not compute what the others do."""
    sizes = ("--hidden", 256, "--intermediate", 128, "--rows", 8, "--expert-rows", 8, "--tokens", 512, "--rounds", 1)
    said = _python("bench/moe_layer.py", *sizes, "--dtype", dtype)
    assert torch.cuda.get_device_name() in said
    assert said.count("ratio") >= 1
    assert said.count("x as fast") == 2
