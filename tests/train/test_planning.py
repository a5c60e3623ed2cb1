"""Plans: sums that are written out here, layouts of the experiments, refusals, the configuration that comes out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moexpand.base.errors import InputError
from moexpand.conf.check import check_batch, check_layout
from moexpand.conf.compose import compose
from moexpand.conf.train_schema import Parallel
from moexpand.train.plan_memory import Work, memory, parameters, stages
from moexpand.train.plan_traffic import traffic
from moexpand.train.planning import GIB, Cluster, examine, flops_of_token, gpu_of
from moexpand.upcycle.count import count
from moexpand.upcycle.models import find_model
from tests.commands import moexpand, run_here, sentence


def work_of(name: str, **changes: Any) -> Work:
    model = find_model(name)
    parts = count(model).parts
    towers = parts["vision"] + parts["time_series"]
    given = {"precision": "bf16", "seq_length": 4096, "micro_batch": 1, "global_batch": 1024, **changes}
    return Work(model.architecture, towers, **given)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-30B-A3B-x4", "Qwen3-VL-235B-A22B-x4", "Qwen3-235B-A22B"])
def test_all_ranks_together_hold_the_model(name: str) -> None:
    """Sums over the stages and the ranks that split them, against the count of every tensor."""
    work, counted = work_of(name), count(find_model(name))
    layers = work.architecture.num_hidden_layers
    whole = parameters(work, Parallel(), stages(layers, Parallel())[0])
    assert whole.dense + whole.experts == counted.total
    assert whole.experts == counted.parts["experts"]
    cut = Parallel(pipeline=2, expert=8)
    pieces = [parameters(work, cut, stage) for stage in stages(layers, cut)]
    assert sum(piece.dense for piece in pieces) == whole.dense
    assert 8 * sum(piece.experts for piece in pieces) == whole.experts
    split = parameters(work, Parallel(tensor=4, expert=8), stages(layers, Parallel())[0])
    arch = work.architecture
    replicated = layers * (2 * arch.hidden_size + 2 * arch.head_dim + arch.num_experts * arch.hidden_size) + arch.hidden_size
    assert 4 * split.dense == whole.dense + 3 * (replicated + work.towers)


def test_states_are_the_sum_of_the_documentation() -> None:
    """Qwen3-30B-A3B-x4 on 64 ranks with EP 8: 2 + 4 bytes a parameter, 12 over its replicas."""
    held = memory(work_of("Qwen3-30B-A3B-x4"), Parallel(expert=8), 64)
    dense, experts = 1.58e9, 115.96e9
    expected = dense * (6 + 12 / 64) + experts / 8 * (6 + 12 / 8)
    assert held.weights + held.gradients + held.optimiser == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("experiment", "model", "nodes", "gpu"),
    [
        ("continue_30b_512", "Qwen3-30B-A3B-x4", 8, "h200"),
        ("continue_1t_256", "Qwen3-VL-235B-A22B-x4", 32, "h200"),
        ("continue_1t_2048", "Qwen3-VL-235B-A22B-x4", 256, "h200"),
    ],
)
def test_the_experiments_fit_where_they_say(experiment: str, model: str, nodes: int, gpu: str) -> None:
    config = compose("train", [f"experiment={experiment}", "data.shards=s", "run.dir=r", "checkpoint=c"])
    work = work_of(
        model, seq_length=config.train.seq_length, micro_batch=config.train.micro_batch, global_batch=config.train.global_batch
    )
    check_layout(config.parallel, work.architecture, "bf16", 8 * nodes)
    check_batch(config.train, config.parallel, 8 * nodes)
    held = memory(replace(work, pictures=0.25), config.parallel, 8 * nodes)
    assert held.total < gpu_of(gpu).nbytes - 6 * GIB
    assert held.total > 0.3 * gpu_of(gpu).nbytes, "a layout that leaves most of the GPU free is not worth its name"


def cluster(nodes: int, gpu: str = "h100") -> Cluster:
    return Cluster(nodes, 8, gpu_of(gpu), 50e9)


def test_what_is_set_is_kept_and_the_order_is_by_time() -> None:
    work = work_of("Qwen3-30B-A3B-x4")
    found, _ = examine(work, cluster(16), Parallel(pipeline=4, recompute="full"))
    assert found
    assert {each.parallel.pipeline for each in found} == {4}
    assert {each.parallel.recompute for each in found} == {"full"}
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    for each in found:
        check_layout(each.parallel, work.architecture, "bf16", 128)


def test_94_layers_are_cut_as_evenly_as_they_can_be() -> None:
    found, _ = examine(work_of("Qwen3-235B-A22B"), cluster(32), Parallel(pipeline=16, expert=8, recompute="full"))
    assert {(each.parallel.first_layers, each.parallel.last_layers) for each in found} == {(5, 5)}
    assert [stage.layers for stage in stages(94, found[0].parallel)] == [5, *[6] * 14, 5]


def test_more_ranks_for_the_states_take_less_of_each() -> None:
    work = work_of("Qwen3-30B-A3B-x4", global_batch=4096)
    small, large = (memory(work, Parallel(expert=8, recompute="full"), ranks) for ranks in (64, 512))
    assert large.optimiser < small.optimiser / 7
    assert (large.weights, large.gradients, large.activations) == (small.weights, small.gradients, small.activations)


def test_links_follow_the_places_of_the_ranks() -> None:
    work = work_of("Qwen3-30B-A3B-x4")

    def links(parallel: Parallel) -> dict[str, str]:
        return {each.purpose: each.link for each in traffic(work, parallel, 128, 8)}

    inside = links(Parallel(expert=8, tensor=2, pipeline=4))
    assert inside["tokens to experts and back"] == "node"
    assert inside["tensor parallelism"] == "node"
    assert inside["pipeline"] == "network"
    assert inside["gradients and weights"] == "network"
    assert links(Parallel(expert=16))["tokens to experts and back"] == "network"


def test_work_of_a_token_is_that_of_its_active_parameters() -> None:
    """Without the attention's scores, 6 flops for each active parameter but the embedding's look-up."""
    work = work_of("Qwen3-30B-A3B", seq_length=1)
    assert flops_of_token(work) == pytest.approx(6 * count(find_model("Qwen3-30B-A3B")).active_without_embedding, rel=2e-3)


def test_gpus_by_name_and_by_size() -> None:
    assert gpu_of("H200").nbytes > gpu_of("h100").nbytes
    assert gpu_of("96").nbytes == 96 * GIB
    for wrong in ("h1000", "0", "-3"):
        with pytest.raises(InputError, match="neither one of a100-40"):
            gpu_of(wrong)


def test_the_command_ends_with_a_configuration_that_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    assert run_here("plan", "model=Qwen3-30B-A3B-x4", "nodes=16", f"out={out}", "top=3") == 0
    said = capsys.readouterr().out
    assert f"{count(find_model('Qwen3-30B-A3B-x4')).total:,} parameters" in said
    assert said.count("grouped_allgather") >= 1
    assert "are refused:" in said
    config = compose("train", ["data.shards=s", "run.dir=r", "checkpoint=c"], str(tmp_path), "mine")
    assert (config.launch.name, config.launch.nodes, config.launch.processes) == ("slurm", 16, 8)
    assert config.precision.name == "bf16"
    check_layout(config.parallel, find_model("Qwen3-30B-A3B-x4").architecture, "bf16", 128)
    assert yaml.safe_load(out.read_text())["train"] == {"global_batch": 1024, "micro_batch": 1, "seq_length": 4096}


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("plan", "model=Qwen3-30B-A3B-x4", "nodes=16", "format=json", "parallel.expert=8", "parallel.pipeline=4") == 0
    told = json.loads(capsys.readouterr().out)
    first = told["fit"][0]
    assert first["parallel"]["expert"] == 8
    assert first["bytes"]["total"] == sum(value for name, value in first["bytes"].items() if name != "total")
    assert first["bytes"]["total"] <= told["limit"]


def test_what_does_not_fit_says_what_is_lacking_and_is_an_answer_not_an_error() -> None:
    done = moexpand("plan", "model=Qwen3-30B-A3B-x4", "nodes=1")
    assert done.returncode == 1
    assert done.stderr == ""
    assert "no layout fits into 73.1 GiB; the smallest" in done.stdout
    assert "gpu=h1" in sentence(moexpand("plan", "model=Qwen3-30B-A3B", "gpu=h1"), 2)
