"""Routes recorded in one forward pass and replayed in another."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.base.errors import InputError
from moexpand.cli import main
from tests.parallel import runs
from tests.processes import run_on_ranks

TOKENS = np.random.default_rng(5).integers(0, 256, (2, 20))


def test_the_command_replays_what_it_recorded(deep_child: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    words = ["logits", f"checkpoint={deep_child}", f"tokens={tmp_path / 'tokens.npy'}"]
    assert main([*words, f"out={tmp_path / 'one.npy'}", f"routes_out={tmp_path / 'routes.npy'}"]) == 0
    routes = np.load(tmp_path / "routes.npy")
    assert (routes.dtype, routes.shape) == (np.uint8, (2, 20, 4, 8))
    shuffled = np.random.default_rng(0).permuted(routes, axis=-1)
    np.save(tmp_path / "shuffled.npy", shuffled)
    assert main([*words, f"out={tmp_path / 'two.npy'}", f"routes={tmp_path / 'shuffled.npy'}"]) == 0
    assert np.abs(np.load(tmp_path / "one.npy") - np.load(tmp_path / "two.npy")).max() <= 1e-5


def test_other_routes_are_followed(deep_child: Path) -> None:
    """Experts of every group, but the first of each instead of the best."""
    from moexpand.parallel.batch import PackedBatch

    batch = PackedBatch.from_sequences(torch.from_numpy(TOKENS))
    routes = np.broadcast_to(np.arange(8, dtype=np.uint8) * 16, (40, 4, 8)).copy()
    with runs.engine(deep_child, {}, {}) as built:
        (own,), _ = built.logits([batch])
        (forced,), recorded = built.logits([batch], routes=[routes])
        assert recorded is None
    assert (own - forced).abs().max() > 0.1


@pytest.mark.parametrize("wrong", ["shape", "group"])
def test_routes_of_another_model_are_refused(
    deep_child: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    shape = (2, 20, 3, 8) if wrong == "shape" else (2, 20, 4, 8)
    np.save(tmp_path / "routes.npy", np.broadcast_to(np.arange(8), shape))
    words = [f"checkpoint={deep_child}", f"tokens={tmp_path / 'tokens.npy'}", f"routes={tmp_path / 'routes.npy'}"]
    assert main(["logits", *words, f"out={tmp_path / 'out.npy'}"]) == 2
    assert "routes.npy" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


def _refused(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InputError as error:
        return [str(error)]
    return []


def refusals(folder: Path, layouts: list[dict[str, Any]]) -> list[tuple[list[str], int]]:
    """What steps and logits say to routes of which rank 1 alone has wrong ones, and the tokens of a step after that."""
    found = []
    for layout in layouts:
        with runs.engine(folder, layout, {"gradient": "ste"}) as built:
            runs.prepare(built)
            batches = runs.device_batches(built, 0)
            good = np.broadcast_to(np.arange(8, dtype=np.uint8) * 16, (64, 4, 8))
            outside, twice = good.copy(), good.copy()
            outside[3, 1] = np.arange(8)
            twice[3, 1, 7] = twice[3, 1, 6]
            said = []
            for wrong in (
                [good] * (len(batches) + 1),
                [good[1:]] * len(batches),
                [outside] * len(batches),
                [twice] * len(batches),
            ):
                routes = wrong if built.ranks.world_rank == 1 else [good] * len(batches)
                said += _refused(partial(built.step, batches, 1e-3, routes=routes))
                said += _refused(partial(built.logits, batches[:1], [routes[-1]]))
            found.append((said, built.step(batches, 1e-3, routes=[good] * len(batches)).tokens))
    return found


def test_wrong_routes_are_refused_on_all_ranks_alike(deep_child: Path) -> None:
    """Nobody waits for the rank that refuses, and the engine still works."""
    layouts = [{"expert": 2, "dispatcher": "grouped_allgather"}, {"expert": 2}, {"pipeline": 2}]
    first, second = run_on_ranks(refusals, 2, deep_child, layouts)
    for layout, (said, tokens), (reason, _) in zip(layouts, first, second, strict=True):
        assert said == ["The routes that another rank was given are refused there."] * 7, layout
        count, *reasons = reason
        micro_batches = 4 if "pipeline" in layout else 2
        assert count == f"The routes of {micro_batches + 1} micro-batches were given for {micro_batches}."
        words = (
            "have the shape [63, 4, 8]",
            "do not visit 1 of every group's 16 experts",
            "send a token to the same expert twice",
        )
        assert [sum(word in each for each in reasons) for word in words] == [2, 2, 2], reasons
        assert all(each.startswith("The routes of micro-batch 0") for each in reasons)
        assert tokens > 0
