"""Routes recorded in one forward pass and replayed in another."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moexpand.cli import main
from tests.parallel import runs

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
