"""A conversion reads every byte of what it converts once, and holds an expert's unit, never a stack of all experts."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from moexpand.upcycle import folder as folder_module
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.conversion import Changes, Conversion
from moexpand.upcycle.folder import write_checkpoint
from tests.expansions import recorded_reads
from tests.upcycle import families, stacks
from tests.upcycle.test_conversion import tower


def converted(source: Path, target: Path, changes: dict[str, Any]) -> Conversion:
    conversion = Conversion(open_checkpoint(source), Changes(**changes))
    write_checkpoint(target, conversion.config, conversion.tensors, conversion.produce, source, "1MB")
    return conversion


@pytest.mark.parametrize("fused", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_vl_moe", {"family": "interns1_pro"}),
        ("qwen3_vl_moe", {"family": "qwen3_moe"}),
        ("qwen3_vl_moe", {"tower": tower(32)}),
        ("interns1", {"family": "qwen3_moe"}),
        ("interns1_pro", {"tower": tower(32)}),
    ],
    ids=["to Intern-S1-Pro", "to text", "fresh tower", "Intern-S1 to text", "fresh tower of Intern-S1-Pro"],
)
def test_every_byte_is_read_once(family: str, changes: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    source = families.make(family, tmp_path / "source", fused=fused, dense=()).folder
    opened = open_checkpoint(source)
    assert opened.transposed == (fused and family == "qwen3_vl_moe"), "as on the hub"
    with recorded_reads() as reads:
        conversion = converted(source, tmp_path / "target", changes)
    due = sum(info.nbytes for name, info in opened.tensors.items() if name not in conversion.left_out)
    headers = {str(info.file.resolve()): 0 for info in opened.tensors.values()}
    found = sum(stop - start for file, start, stop in reads if file in headers)
    assert found == due


@pytest.mark.parametrize("fused", [True, False], ids=["stacked", "one by one"])
def test_memory_is_that_of_an_expert_not_of_a_stack(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 experts of 3 x 96 KiB: a stack of gates and ups is 12 MiB, the largest tensor beside the experts 0.3 MiB."""
    sizes = {"experts": 64, "layers": 1, "dense": (), "hidden": 256, "inner": 192, "vocab": 600}
    source = families.make("qwen3_vl_moe", tmp_path / "source", fused=fused, **sizes)
    monkeypatch.setattr(folder_module, "PIECE", 64 << 10)
    for name, changes in (("fresh", {"tower": tower(256)}), ("text", {"family": "qwen3_moe"})):
        tracemalloc.start()
        try:
            converted(source.folder, tmp_path / name, changes)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20, (name, peak)
        after = stacks.apart(stacks.read(tmp_path / name), transposed=fused and name == "fresh")
        prefix = "model." if name == "text" else "model.language_model."
        for tensor, value in source.tensors.items():
            if ".mlp.experts." in tensor:
                assert stacks.bits(after[tensor.replace("model.language_model.", prefix)]).equal(stacks.bits(value)), tensor
