"""Load figures by hand, and tables that never hold a step twice."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moexpand.base.errors import InputError
from moexpand.parallel.engine import StepReport
from moexpand.parallel.optimizer import Rates
from moexpand.train.checkpoints import Progress
from moexpand.train.metrics import console_line, load_metrics, step_row
from moexpand.train.tables import Table, read_rows


def test_uniform_load_is_one_everywhere() -> None:
    found = load_metrics(torch.full((3, 8), 5.0, dtype=torch.float64), groups=4)
    assert found["moe/load_cv"] == found["moe/group_load_cv"] == found["moe/dead_experts"] == 0
    assert found["moe/load_max"] == 1
    assert found["moe/load_entropy"] == pytest.approx(1)


def test_load_figures_of_two_layers_by_hand() -> None:
    """Layer 0: all on one of four experts. Layer 1: 3 and 1 in the first group, 2 and 2 in the second."""
    counts = torch.tensor([[8, 0, 0, 0], [3, 1, 2, 2]], dtype=torch.float64)
    found = load_metrics(counts, groups=2)
    assert found["moe/load_max"] == pytest.approx((4 + 1.5) / 2)
    assert found["moe/group_load_max"] == pytest.approx((2 + 1.5) / 2)
    assert found["moe/load_cv"] == pytest.approx((math.sqrt(3) + math.sqrt(0.5) / 2) / 2)
    # Group figures: layer 0 has (4 +- 4) / 4 = 1 and an empty group; layer 1 has (2 +- 1) / 2 = 0.5 and 0.
    assert found["moe/group_load_cv"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    entropy = -sum(n / 8 * math.log(n / 8) for n in (3, 1, 2, 2)) / math.log(4)
    assert found["moe/load_entropy"] == pytest.approx((0 + entropy) / 2)
    assert found["moe/dead_experts"] == pytest.approx(3 / 8)


def test_a_step_without_any_token_has_finite_figures() -> None:
    assert all(math.isfinite(value) for value in load_metrics(torch.zeros(2, 8, dtype=torch.float64), groups=2).values())


def test_a_row_holds_what_others_read_and_the_line_what_people_read() -> None:
    report = StepReport(
        loss=2.0 / 3.0,
        tokens=50,
        grad_norm=1.5,
        skipped=True,
        dispatched=torch.ones(2, 4, dtype=torch.float64),
        balance=torch.tensor([1.0, 2.0], dtype=torch.float64),
        group_balance=torch.tensor([1.0, 3.0], dtype=torch.float64),
        z_loss=torch.tensor([4.0, 6.0], dtype=torch.float64),
        rank_rows=torch.tensor([30.0, 10.0], dtype=torch.float64),
    )
    progress = Progress(step=7, tokens=123, fixed={}, noted={}, wandb_id="")
    row = json.loads(json.dumps(step_row(report, progress, Rates(1e-3, routers=2e-3), seconds=2.0, data_seconds=0.5, groups=2)))
    names = "step tokens loss grad_norm lr tokens_per_second data_seconds skipped"
    assert [row[name] for name in names.split()] == [7, 123, 2.0 / 3.0, 1.5, 1e-3, 25.0, 0.5, 1]
    assert (row["moe/balance_loss"], row["moe/group_balance_loss"], row["moe/z_loss"]) == (1.5, 2.0, 5.0)
    assert (row["router_lr"], row["moe/rank_rows_cv"], row["moe/rank_rows_max"]) == (2e-3, 0.5, 1.5)
    line = console_line(row | {"memory_gib": 12.34}, 100)
    assert "\n" not in line
    for part in ("7/100", "0.6667", "1.500", "SKIPPED"):
        assert part in line


def test_going_on_removes_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    table = Table(path, 0)
    for step in range(1, 6):
        table.append({"step": step, "loss": step / 3})
    table.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5]
    table = Table(path, 3)
    table.append({"step": 4, "loss": 4 / 3})
    table.close()
    assert read_rows(path) == [{"step": step, "loss": step / 3} for step in range(1, 5)]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damaged", [b'{"step": 2, "lo', b"\0\0\0\0", b"\xff\xfe", b'{"loss": 1.0}', b"[2]"])
def test_a_damaged_line_is_named_and_the_file_stays(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n{"st'
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path} is damaged: line 2 is no JSON object with a step; remove that line\.$"):
        Table(path, 3)
    assert path.read_bytes() == content
    path.write_bytes(content.replace(damaged + b"\n", b""))
    Table(path, 3).close()
    assert read_rows(path) == [{"step": 1}, {"step": 3}]


def test_a_new_run_starts_without_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Table(tmp_path / "metrics.jsonl", 0).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    Table(tmp_path / "metrics.jsonl", -1).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_rows_wait_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, in order, whole, and nothing is missing when there is room again; half a row is taken back."""
    said: list[str] = []
    table = Table(tmp_path / "metrics.jsonl", 0, said.append)
    table.append({"step": 1})
    file, room = table._file, 5

    class Small:
        """Takes a few bytes of what it is given, as a disk does that has no more."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, lines: bytes) -> int:
            return file.write(lines[:room])

    monkeypatch.setattr(table, "_file", Small())
    table.append({"step": 2})
    table.append({"step": 3})
    assert read_rows(table.path) == [{"step": 1}]
    assert table.path.read_bytes() == b'{"step": 1}\n'
    assert len(said) == 1
    assert "disk is full while writing" in said[0]
    assert str(table.path) in said[0]
    monkeypatch.setattr(table, "_file", file)
    table.append({"step": 4})
    table.close()
    assert read_rows(table.path) == [{"step": step} for step in (1, 2, 3, 4)]
    assert "nothing is missing" in said[1]


def _records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    content, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_every_row_under_its_step(tmp_path: Path) -> None:
    """Read back from W&B's own file, and its folder is told."""
    from wandb.proto import wandb_internal_pb2

    from moexpand.conf.train_schema import Track
    from moexpand.train.tracking import Tracker

    said: list[str] = []
    tables = {"expansion": (("layer", "parents copied"), [[0, 128], [1, 127]])}
    tracker = Tracker(Track(wandb="offline", group="sweep"), tmp_path, "identity0001", {"seed": 3}, said.append, tables)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": 4.0 - step / 8})
    tracker.finish()
    (told,) = said
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-identity0001")
    assert told == f"W&B: tracked offline; upload with: wandb sync {folder}"
    (file,) = folder.glob("*.wandb")
    losses: dict[int, float] = {}
    for data in _records(file):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "loss" in row:  # the tables come in a row of their own
                losses[row["step"]] = row["loss"]
        elif record.WhichOneof("record_type") == "run":
            assert record.run.run_group == "sweep"
            assert record.run.run_id == "identity0001"
    assert losses == {1: 3.875, 2: 3.75, 3: 3.625}
    (table,) = (folder / "files" / "media" / "table").glob("expansion_*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["layer", "parents copied"], "data": [[0, 128], [1, 127]]}


def test_the_table_of_an_expansion_counts_what_the_map_says() -> None:
    from moexpand.train.expansion_table import COLUMNS, expansion_rows
    from moexpand.upcycle.plan import Plan

    # Two groups of three slots: parent 0 in both groups, parent 1 twice in one, parent 2 once.
    plan = Plan(parent="p", num_experts=6, num_groups=2, placement="map", slot_to_parent=((0, 1, 1, 0, 0, 2), ()))
    (row,) = expansion_rows(plan)
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "layer": 0, "experts": 6, "groups": 2, "parents copied": 3, "copies of one, least": 1, "copies of one, most": 3,
        "groups that hold a parent's copies, mean": pytest.approx(4 / 3, abs=1e-4),
    }  # fmt: skip
