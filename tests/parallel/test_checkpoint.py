"""A checkpoint brings weights and optimiser back: bitwise on the same layout, to rounding on every other."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel import runs
from tests.parallel.legs import RULES, Leg, legs
from tests.parallel.runs import Row
from tests.processes import run_on_ranks

SAVED_AT, END = 3, 6


def _close(found: list[Row], due: list[Row], bound: float) -> bool:
    return all(
        one.loss == pytest.approx(other.loss, rel=bound) and one.grad_norm == pytest.approx(other.grad_norm, rel=10 * bound)
        for one, other in zip(found, due, strict=True)
    )


@pytest.fixture(scope="module")
def saved(parent: Path, tied_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Row]]]:
    """Checkpoints of EP 2 after three steps, by precision, with the next three steps of the run that never stopped."""
    folder, made = tmp_path_factory.mktemp("saved"), {"fp32": parent, "bf16": parent, "tied": tied_parent}
    several = []
    for name, source in made.items():
        precision = "fp32" if name == "tied" else name
        several.append(Leg(source, {"expert": 2}, precision, 0, END))
        several.append(Leg(source, {"expert": 2}, precision, 0, SAVED_AT, save=folder / name))
        several.append(Leg(source, {"expert": 2}, precision, SAVED_AT, END, load=folder / name))
    answers = run_on_ranks(legs, 2, several)
    found = {}
    for number, name in enumerate(made):
        straight, _, resumed = (rows for rows, _ in answers[0][3 * number : 3 * number + 3])
        assert resumed == straight[SAVED_AT:], f"{name}: resuming on the same layout is bitwise"
        found[name] = (folder / name, straight)
    return found


def test_a_run_that_stopped_goes_on_bitwise_on_the_same_layout(saved: dict[str, tuple[Path, list[Row]]]) -> None:
    """The fixture compares; here, that the compared numbers moved and that precisions differ."""
    for _, straight in saved.values():
        assert len({row.loss for row in straight}) == END
    assert saved["fp32"][1] != saved["bf16"][1]


def test_one_rank_goes_on_from_two(saved: dict[str, tuple[Path, list[Row]]], parent: Path, tied_parent: Path) -> None:
    for name, source, precision, bound in (
        ("fp32", parent, "fp32", 1e-6),
        ("tied", tied_parent, "fp32", 1e-6),
        ("bf16", parent, "bf16", 2e-3),
    ):
        folder, straight = saved[name]
        ((rows, _),) = legs([Leg(source, {}, precision, SAVED_AT, END, load=folder)])
        assert _close(rows, straight[SAVED_AT:], bound), (name, rows, straight)


def test_without_the_optimisers_states_the_next_steps_differ(saved: dict[str, tuple[Path, list[Row]]], parent: Path) -> None:
    """The bound of the other tests would notice forgotten moments or a forgotten step count."""
    from moexpand.parallel import checkpoint

    folder, straight = saved["fp32"]
    with runs.engine(parent, {}, RULES) as built:
        checkpoint.load(built, folder)
        runs.prepare(built)
        rows = runs.train(built, SAVED_AT, END)
    assert rows[0].loss == pytest.approx(straight[SAVED_AT].loss, rel=1e-6)
    assert not _close(rows[1:], straight[SAVED_AT + 1 :], 1e-5)


@pytest.mark.parametrize(
    ("size", "layouts"),
    [(2, [{"pipeline": 2}, {"tensor": 2, "expert": 2}, {}]), (4, [{"expert": 4}, {"pipeline": 2, "expert": 2}])],
    ids=["two ranks", "four ranks"],
)
def test_other_layouts_go_on_with_the_optimiser(
    saved: dict[str, tuple[Path, list[Row]]], parent: Path, tied_parent: Path, size: int, layouts: list[dict[str, Any]]
) -> None:
    sources = {"fp32": parent, "tied": tied_parent}
    jobs = [(name, layout) for name in sources for layout in layouts]
    several = [Leg(sources[name], layout, "fp32", SAVED_AT, END, load=saved[name][0]) for name, layout in jobs]
    for (name, layout), (rows, _) in zip(jobs, run_on_ranks(legs, size, several)[0], strict=True):
        assert _close(rows, saved[name][1][SAVED_AT:], 1e-6), (name, layout, rows, saved[name][1][SAVED_AT:])


def _saved_pieces(folder: Path, source: Path) -> dict[str, Any]:
    """A checkpoint of two steps and, off the engine, what a few of its tensors are."""
    from moexpand.parallel import checkpoint, optimizer_state, ranks

    with runs.engine(source, {"expert": 2}, RULES, "bf16") as built:
        runs.prepare(built)
        runs.train(built, 0, 2)
        writer = checkpoint.Writer(built)
        if built.ranks.main:
            folder.mkdir()
        ranks.barrier()
        writer.start(folder, {"step": 2}, background=True)
        held = {name: value.float().numpy().copy() for name, value in built.stages[0].state_dict().items() if value is not None}
        runs.train(built, 2, 4)  # the copy is of the states before these steps
        writer.finish()
        parts = optimizer_state.parts(built.optimizer)
    return {"held": held, "moments": sum(shard.numel() for part in parts for shard in part.optimizer.state)}


def test_torchs_own_reader_reads_what_was_copied_while_training_went_on(parent: Path, tmp_path: Path) -> None:
    """Stacked as Megatron-Core names them; the file is no larger than its numbers (a view must not bring its whole memory)."""
    import numpy as np
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = tmp_path / "checkpoint"
    answers = run_on_ranks(_saved_pieces, 2, folder, parent)
    table = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in table.items()
        if isinstance(each, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    held = [answer["held"] for answer in answers]
    np.testing.assert_array_equal(state["output_layer.weight"].float(), held[0]["output_layer.weight"])
    layers = sorted(name for name in held[0] if name.endswith("mlp.experts.down"))
    whole = np.stack([np.concatenate([rank[name] for rank in held]) for name in layers])
    np.testing.assert_array_equal(state["decoder.layers.mlp.experts.down"].float(), whole)
    masters = state["optimizer.state.param.decoder.layers.mlp.experts.down"]
    assert masters.dtype == torch.float32
    np.testing.assert_array_equal(masters.bfloat16().float(), whole)
    moments = state["optimizer.state.exp_avg_sq.decoder.layers.mlp.experts.down"]
    assert bool((moments >= 0).all())
    assert float(moments.max()) > 0
    numbers = sum(tensor.nbytes for tensor in state.values())
    written = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    assert numbers < written < numbers + 3000 * 3 * len(state) * 2
