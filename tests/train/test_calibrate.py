"""A calibration holds what transformers' own router of the parent does on the same tokens, whatever the layout."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moexpand.data.loader import MicroBatch, PackedData
from moexpand.train.calibrate import spread_sample
from moexpand.upcycle.calibration import Calibration, read_calibration
from tests.commands import moexpand
from tests.parallel import runs
from tests.parents import make_parent
from tests.processes import run_on_ranks

EXPERTS, TOP_K, LAYERS, LENGTH, TOKENS, SAMPLE, SEED = 16, 4, 2, 64, 2000, 100, 3
LAYOUTS = {
    "EP2": ["parallel.expert=2"],
    "EP2, all-gather": ["parallel.expert=2", "parallel.dispatcher=allgather"],
    "DP2": [],
    "PP2": ["parallel.pipeline=2"],
    "TP2": ["parallel.tensor=2"],
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts, top-4, two layers, the vocabulary of the shards."""
    shape: dict[str, Any] = {"hidden": 32, "layers": LAYERS, "intermediate": 16, "vocab": 8448, "heads": 2, "kv_heads": 2}
    return make_parent(tmp_path_factory.mktemp("calibrate") / "parent", experts=EXPERTS, top_k=TOP_K, **shape)


def words(parent: Path, shards: Path, out: Path, *more: str) -> list[str]:
    sizes = [f"tokens={TOKENS}", f"sample={SAMPLE}", f"seq_length={LENGTH}", f"seed={SEED}"]
    return ["calibrate", f"checkpoint={parent}", f"data.shards={shards}", f"out={out}", *sizes, *more]


def calibrate(parent: Path, shards: Path, out: Path, *more: str) -> Calibration:
    """Run the command in this process."""
    from moexpand.cli import main

    assert main(words(parent, shards, out, *more)) == 0
    return read_calibration(out)


@pytest.fixture(scope="module")
def found(parent: Path, shards: Path) -> Calibration:
    return calibrate(parent, shards, parent.with_name("calibration"))


@pytest.fixture(scope="module")
def packs(shards: Path) -> list[MicroBatch]:
    """The packs that hold the first 2,000 unmasked tokens."""
    data, taken = PackedData(shards, LENGTH, 1, SEED, held_out=0.0), []
    while sum(int(pack.loss_mask.sum()) for pack in taken) < TOKENS:
        taken += data.batch(len(taken))
    return taken


def gate_logits(parent: Path, packs: list[MicroBatch]) -> np.ndarray:
    """Router logits [L, T, E] in float64 of the unmasked tokens: transformers' hidden states, every segment alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent).eval()
    inputs: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]

    def keep(layer: int, x_TH: torch.Tensor, mask: np.ndarray) -> None:
        inputs[layer].append(x_TH.detach().reshape(-1, x_TH.shape[-1]).double().numpy()[mask])

    for pack in packs:
        for start, stop in pairwise(pack.cu_seqlens.tolist()):
            mask = pack.loss_mask[start:stop] > 0
            hooks = [
                layer.mlp.gate.register_forward_pre_hook(lambda _, given, l=l, mask=mask: keep(l, given[0], mask))
                for l, layer in enumerate(model.model.layers)
            ]
            with torch.no_grad():
                model(torch.from_numpy(pack.tokens[None, start:stop]))
            for hook in hooks:
                hook.remove()
    gates = [layer.mlp.gate.weight.detach().double().numpy() for layer in model.model.layers]
    return np.stack([np.concatenate(inputs[l]) @ gates[l].T for l in range(LAYERS)])


@pytest.fixture(scope="module")
def due(parent: Path, packs: list[MicroBatch]) -> np.ndarray:
    return gate_logits(parent, packs)


def assert_counts(counts: Any, chosen_TK: np.ndarray) -> None:
    """Counts equal those of the choices, best first, counted one token after the other."""
    usage, rank, pairs = np.zeros(EXPERTS, int), np.zeros((TOP_K, EXPERTS), int), np.zeros((EXPERTS, EXPERTS), int)
    for chosen in chosen_TK:
        usage[chosen] += 1
        rank[np.arange(TOP_K), chosen] += 1
        pairs[np.ix_(chosen, chosen)] += 1
    np.fill_diagonal(pairs, 0)
    assert np.array_equal(counts.rank, rank)
    assert np.array_equal(counts.usage, usage)
    assert np.array_equal(counts.coactivation, pairs)


def test_counts_are_those_of_transformers_exactly(found: Calibration, due: np.ndarray) -> None:
    assert found.tokens == due.shape[1]
    assert found.tokens >= TOKENS
    assert list(found.layers) == list(range(LAYERS))
    for layer in range(LAYERS):
        assert_counts(found.layers[layer], np.argsort(-due[layer], axis=1)[:, :TOP_K])


def test_the_sample_is_of_the_same_spread_tokens_in_every_layer(found: Calibration, due: np.ndarray) -> None:
    tokens = spread_sample(found.tokens, SAMPLE, SEED)
    for layer in range(LAYERS):
        logits = found.logits(layer)
        assert logits.shape == (SAMPLE, EXPERTS)
        assert np.abs(logits - due[layer, tokens]).max() <= 1e-5
        # The bound means something: neighbouring tokens are far away.
        assert np.abs(logits - due[layer, tokens - 1]).max(1).min() > 1e-3


def test_counts_on_disk_add_up(found: Calibration) -> None:
    summary = json.loads((found.folder / "calibration.json").read_text())
    assert summary["sequences"] * LENGTH >= summary["tokens"] == found.tokens
    for layer in range(LAYERS):
        counts = json.loads((found.folder / f"layers/layer_{layer:03d}.json").read_text())
        assert sum(counts["usage"]) == TOP_K * found.tokens
        assert [sum(row) for row in counts["rank"]] == [found.tokens] * TOP_K
        assert [sum(row) for row in counts["coactivation"]] == [(TOP_K - 1) * count for count in counts["usage"]]


def test_the_parent_is_known_by_its_fingerprint(found: Calibration, parent: Path) -> None:
    from moexpand.upcycle.checkpoint import open_checkpoint

    assert found.parent == open_checkpoint(parent).fingerprint


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_a_sample_has_one_token_of_every_part(tokens: int, size: int, seed: int) -> None:
    sample = spread_sample(tokens, size, seed)
    size = min(size, tokens)
    assert len(set(sample.tolist())) == size
    assert all(i * tokens // size <= token < (i + 1) * tokens // size for i, token in enumerate(sample.tolist()))
    assert np.array_equal(sample, spread_sample(tokens, size, seed))


def on_ranks(jobs: list[list[str]]) -> None:
    """The worker with several command lines, one after the other."""
    from moexpand.conf.compose import compose
    from moexpand.train.calibrate import run_worker

    for job in jobs:
        run_worker(compose("calibrate", job[1:]))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def test_every_layout_on_two_ranks_counts_the_same(parent: Path, shards: Path, found: Calibration, tmp_path: Path) -> None:
    jobs = {name: words(parent, shards, tmp_path / name, *layout) for name, layout in LAYOUTS.items()}
    # One sequence for two ranks: one of them only keeps the other company.
    few = ["tokens=1", "sample=5"]
    jobs["few"] = words(parent, shards, tmp_path / "few", "parallel.expert=2", *few)
    run_on_ranks(on_ranks, 2, list(jobs.values()))
    pairs = [(name, found) for name in LAYOUTS] + [("few", calibrate(parent, shards, tmp_path / "alone", *few))]
    for name, alone in pairs:
        split = read_calibration(tmp_path / name)
        assert (split.tokens, split.sequences) == (alone.tokens, alone.sequences), name
        for layer in range(LAYERS):
            for field in ("usage", "rank", "coactivation"):
                assert np.array_equal(getattr(split.layers[layer], field), getattr(alone.layers[layer], field)), (name, field)
            assert np.abs(split.logits(layer) - alone.logits(layer)).max() <= 1e-5, name


def test_a_model_that_routes_in_groups_is_counted_best_first(parent: Path, shards: Path, tmp_path: Path, due: np.ndarray) -> None:
    grouped = tmp_path / "grouped"
    shutil.copytree(parent, grouped)
    config = json.loads((grouped / "config.json").read_text())
    config |= {"model_type": "qwen3_moe_grouped", "architectures": ["Qwen3MoeGroupedForCausalLM"], "router_n_groups": 2}
    (grouped / "config.json").write_text(json.dumps(config))
    counts = calibrate(grouped, shards, tmp_path / "out").layers[0]  # before the first experts nothing differs from the parent
    halves = due[0].reshape(-1, 2, EXPERTS // 2)
    chosen = np.concatenate([np.argsort(-halves[:, g], axis=1)[:, : TOP_K // 2] + g * EXPERTS // 2 for g in range(2)], axis=1)
    best_first = np.take_along_axis(chosen, np.argsort(-np.take_along_axis(due[0], chosen, 1), axis=1), 1)
    assert_counts(counts, best_first)


def test_shards_that_hold_fewer_tokens_are_routed_once(parent: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    found = calibrate(parent, shards, tmp_path / "out", "tokens=1000000", "sample=1000000", "seq_length=512")
    data = PackedData(shards, 512, 1, SEED, held_out=0.0)
    once = sum(int(data.batch(pack)[0].loss_mask.sum()) for pack in range(data.packs_per_epoch))
    assert (found.sequences, found.tokens, found.sample) == (data.packs_per_epoch, once, once)
    assert f"{once:,} of the 1,000,000 tokens asked for" in capsys.readouterr().out


def test_bf16_counts_every_token_too(parent: Path, shards: Path, tmp_path: Path, due: np.ndarray) -> None:
    found = calibrate(parent, shards, tmp_path / "out", "precision=bf16")
    assert found.precision == "bf16"
    exact = np.bincount(np.argsort(-due[0], axis=1)[:, :TOP_K].ravel(), minlength=EXPERTS)
    moved = np.abs(found.layers[0].usage - exact).sum()
    assert 0 < moved < 0.05 * exact.sum()


def test_an_engine_that_was_observed_computes_as_before(parent: Path, packs: list[MicroBatch]) -> None:
    from moexpand.parallel.batch import PackedBatch

    batch = PackedBatch.from_arrays(packs[0], torch.device("cpu"))
    heard: list[tuple[int, int]] = []
    with runs.engine(parent, {}, {}) as built:
        (before,), _ = built.logits([batch])
        built.observe_routing([batch, batch], lambda number, layer, logits, chosen: heard.append((number, layer)))
        (after,), _ = built.logits([batch])
    assert heard == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert torch.equal(before, after)


@pytest.fixture(scope="module")
def printed(parent: Path, shards: Path, found: Calibration) -> tuple[Path, list[str]]:
    """The real command on two ranks: its folder and what it printed."""
    out = parent.with_name("printed") / "calibration"
    done = moexpand(*words(parent, shards, out, "processes=2", "parallel=ep2"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout.splitlines()


def test_the_command_leaves_its_folder_and_nothing_else(printed: tuple[Path, list[str]], found: Calibration) -> None:
    out, _ = printed
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert np.array_equal(read_calibration(out).layers[1].rank, found.layers[1].rank)


def test_the_command_prints_a_line_a_layer_and_how_fast_it_went(printed: tuple[Path, list[str]], due: np.ndarray) -> None:
    _, lines = printed
    head = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    rows = [line.split() for line in lines[head + 1 : head + 1 + LAYERS]]
    sampled = due[:, spread_sample(due.shape[1], SAMPLE, SEED)]
    for layer, row in enumerate(rows):
        chosen = np.argsort(-due[layer], axis=1)[:, :TOP_K]
        shares = np.bincount(chosen.ravel(), minlength=EXPERTS) / chosen.size
        softmax = np.exp(sampled[layer]) / np.exp(sampled[layer]).sum(1, keepdims=True)
        best = np.sort(softmax, axis=1)[:, -TOP_K:]
        entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        expected = [entropy, np.exp(entropy), EXPERTS * shares.max(), (shares == 0).sum()]
        expected += [(best.max(1) / best.sum(1)).mean(), best.sum(1).mean()]
        assert int(row[0]) == layer
        for text, value in zip(row[1:], expected, strict=True):
            assert abs(float(text) - value) <= 0.51 * 10.0 ** -len(text.partition(".")[2]), (layer, text, value)
    assert any(line.endswith("a second.") for line in lines)


def test_a_target_that_exists_is_refused_and_left_alone(parent: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    from moexpand.cli import main

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(words(parent, shards, tmp_path / "out", "processes=2", "parallel.expert=2")) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


WRONG = {
    "a layout that does not fit": (["parallel.expert=3", "processes=3"], "parallel.expert"),
    "ranks that do not fit": (["parallel.expert=2"], "(processes)"),
    "sequences that cannot be split": (["parallel.tensor=2", "processes=2", "seq_length=63"], "seq_length=63"),
    "no checkpoint": (["checkpoint=nowhere"], "nowhere"),
    "no shards": (["data.shards=nowhere"], "nowhere"),
    "another tokenizer": (["data.tokenizer=qwen"], "tokenizer"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_work_is_refused_before_anything_is_written(
    parent: Path, shards: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    from moexpand.cli import main

    changes, expected = WRONG[name]
    assert main(words(parent, shards, tmp_path / "out", *changes)) == 2
    err = capsys.readouterr().err.strip()
    assert expected in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_sample_is_named_and_nothing_is_left(parent: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    from moexpand.cli import main
    from moexpand.parallel import ranks

    damaged, out = tmp_path / "shards", tmp_path / "out"
    shutil.copytree(shards, damaged)
    tar = next(damaged.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[content.index(b"Text 7.")] ^= 1
    tar.write_bytes(content)
    try:
        assert main(words(parent, damaged, out, "tokens=1000000")) == 2
    finally:
        ranks.stop()  # a process that fails ends without leaving its groups
    err = capsys.readouterr().err.strip()
    assert tar.name in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
