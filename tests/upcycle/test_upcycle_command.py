"""`moexpand upcycle` as a user meets it: the plan comes first, is exact, can be reviewed, and gives the same bytes again."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moexpand.base.errors import DONE
from moexpand.upcycle.calibration import read_calibration
from moexpand.upcycle.checkpoint import SAMPLED, open_checkpoint
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.planner import predict_step_zero
from moexpand.upcycle.safetensors_file import TensorInfo
from tests import closed_form
from tests.commands import ROOT, moexpand, sentence
from tests.parents import TINY, make_parent
from tests.upcycle.conftest import Run
from tests.upcycle.expanding import hashes

SHARDS = "max_shard_size=300KB"


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


# ---------------------------------------------------------------- plan first


def test_a_dry_run_reads_headers_writes_nothing_and_tells_the_exact_sizes(
    top8_parent: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "child"
    words = ["upcycle", f"source={top8_parent}", f"target={target}", "num_experts=128", SHARDS, "workers=3"]
    before = hashes(top8_parent)
    code, out, _ = run(*words, "dry_run=true")
    assert code == DONE
    assert list(tmp_path.iterdir()) == []
    assert hashes(top8_parent) == before
    said = {match[1]: int(match[2].replace(",", "")) for match in re.finditer(r"(model-\S+)\s+([\d,]+)", out)}
    total = int(re.search(r"([\d,]+) to write in (\d+) shards", out)[1].replace(",", ""))
    for words_of_a_plan in (
        f"{top8_parent} -> {target}: 32 -> 128 experts in 8 groups, quarters_spread; copies, router noise 0.05",
        f"{open_checkpoint(top8_parent).nbytes:,} bytes to read",
        "free on the target's disk",
        "MiB of memory with 3 workers",
        "a probe of the target's disk wrote",
        "Step 0: unknown without a calibration",
        f"Nothing was written to {target}",
    ):
        assert words_of_a_plan in out
    assert run(*words)[0] == DONE
    assert said == _sizes(target)
    assert len(said) > 2
    assert sum(said.values()) == total


@pytest.mark.parametrize(("placement", "routers"), [("halves_bits", False), ("quarters_spread", True)])
def test_planning_reads_vectors_and_where_needed_routers_and_no_other_matrix(
    top8_parent: Path, calibration: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, routers: bool
) -> None:
    seen: list[tuple[str, int, int]] = []
    real = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        done = real(descriptor, buffers, offset, *flags)
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, done))
        return done

    monkeypatch.setattr(os, "preadv", counted)
    code, *_ = run(
        "upcycle",
        f"source={top8_parent}",
        f"target={tmp_path / 'child'}",
        "num_experts=128",
        f"placement={placement}",
        "dry_run=true",
    )
    assert code == DONE
    infos = list(open_checkpoint(top8_parent).tensors.values())
    places = [place for place in seen if place[0].startswith(str(top8_parent))]
    # The fingerprint takes the head of every tensor; nothing else is read of matrices that no placement needs.
    beyond = {_holder(infos, *place) for place in places if place[2] > SAMPLED}
    assert beyond == ({f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)} if routers else set())
    assert {_holder(infos, *place) for place in places} == {info.name for info in infos}
    heads = {(str(info.file), info.start) for info in infos}
    assert all((file, offset) in heads for file, offset, _ in places)


def _holder(infos: list[TensorInfo], file: str, offset: int, size: int) -> str:
    """The tensor that holds a range."""
    return next(info.name for info in infos if str(info.file) == file and info.start <= offset and offset + size <= info.stop)


def test_a_calibration_gives_the_prediction_that_it_implies(
    top8_parent: Path, calibration: Path, run: Run, tmp_path: Path
) -> None:
    words = ["upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", "num_experts=128", "dry_run=true"]
    said = {}
    for placement in ("quarters_spread", "block_spread", "halves_tile"):
        plan = tmp_path / f"{placement}.json"
        code, out, _ = run(*words, f"placement={placement}", f"calibration={calibration}", f"plan_out={plan}")
        assert code == DONE
        due = predict_step_zero(open_checkpoint(top8_parent), read_plan(plan), read_calibration(calibration))
        assert f"{due.gate_mass:.1%} of the parent's gate mass kept, {due.distinct:.2f} distinct experts a token" in out
        assert f"total variation of the combine weights {due.total_variation:.3f}" in out
        said[placement] = json.loads(plan.read_text())["prediction"]
        assert said[placement]["total_variation"] == pytest.approx(due.total_variation)
        assert set(said[placement]["layers"]) == {"0", "1"}
    assert said["block_spread"]["total_variation"] < said["halves_tile"]["total_variation"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json" for name in sorted(said)]


def test_a_plan_is_reviewed_as_json_and_gives_the_same_bytes_again(top8_parent: Path, run: Run, tmp_path: Path) -> None:
    plan, source = tmp_path / "plan.json", f"source={top8_parent}"
    made = ["num_experts=128", "placement=random_balanced", "seed=7", "init=drop", "drop_fraction=0.25", "router_noise=0.01"]
    assert run("upcycle", source, f"target={tmp_path / 'one'}", *made, SHARDS, f"plan_out={plan}")[0] == DONE
    value = json.loads(plan.read_text())
    assert value["output"] == {"bytes": sum(_sizes(tmp_path / "one").values()), "shards": _sizes(tmp_path / "one")}
    assert value["prediction"] == "unknown"
    assert value["warnings"] == []
    assert run("upcycle", source, f"target={tmp_path / 'two'}", f"plan={plan}", SHARDS, "workers=1")[0] == DONE
    # Keys that say what the plan says anyway are no contradiction.
    assert run("upcycle", source, f"target={tmp_path / 'three'}", f"plan={plan}", SHARDS, *made)[0] == DONE
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")
    assert run("verify", source, f"target={tmp_path / 'two'}")[0] == DONE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["num_experts=256"], "num_experts=256 was given, but plan={plan} has num_experts=128; leave num_experts out"),
        (["num_groups=4"], "num_groups=4 was given, but plan={plan} has num_groups=8"),
        (["placement=block"], "placement=block was given, but plan={plan} has placement=halves_bits"),
        (["num_experts=512"], "num_experts=512 was given, but plan={plan} has num_experts=128"),
        (["keep_first=true", "seed=1"], "seed=1 was given, but plan={plan} has seed=0"),
        (["router_noise=0.1"], "router_noise=0.1 was given, but plan={plan} has router_noise=0.0"),
        (["experts_layout=fused"], "experts_layout=fused was given, but plan={plan} has experts_layout=split"),
        (["map=map.json"], "map=map.json was given, but plan={plan} says what the child is; leave map out"),
        (["regroup=true"], "regroup=true was given, but plan={plan} says what the child is"),
    ],
)
def test_a_key_that_contradicts_a_plan_is_named(
    top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path, words: list[str], says: str
) -> None:
    plan = tmp_path / "plan.json"
    make = ["num_experts=128", "placement=halves_bits", "dry_run=true", f"plan_out={plan}"]
    assert run("upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", *make)[0] == DONE
    assert says.format(plan=plan) in refused(top8_parent, f"plan={plan}", *words)


def test_an_edited_map_needs_the_name_map(top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    plan, source, target = tmp_path / "plan.json", f"source={top8_parent}", tmp_path / "child"
    assert run("upcycle", source, f"target={target}", "num_experts=128", "dry_run=true", f"plan_out={plan}")[0] == DONE
    value = json.loads(plan.read_text())
    row = value["slot_to_parent"][1]
    row[0], row[-1] = row[-1], row[0]
    plan.write_text(json.dumps(value))
    assert 'a map of your own is a plan with "placement": "map"' in refused(top8_parent, f"plan={plan}")
    plan.write_text(json.dumps(value | {"placement": "map"}))
    assert run("upcycle", source, f"target={target}", f"plan={plan}")[0] == DONE
    code, out, _ = run("verify", source, f"target={target}")
    assert code == DONE
    assert "128 experts in 8 groups, map; copies, router noise 0.05" in out
    assert "Its map is taken from the plan as it stands." in out
    rows, theirs = (closed_form.weights_of(folder) for folder in (target, top8_parent))
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        ours = rows[f"model.layers.1.mlp.experts.0.{matrix}.weight"]
        assert (ours == theirs[f"model.layers.1.mlp.experts.{row[0]}.{matrix}.weight"]).all()


def test_a_plan_of_another_parent_is_refused(top8_parent: Path, run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    make = ["num_experts=128", "dry_run=true", f"plan_out={plan}"]
    assert run("upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", *make)[0] == DONE
    other = make_parent(tmp_path / "other", **TINY | {"experts": 32, "top_k": 8, "layers": 2, "seed": 9})
    assert f"{plan} is for another parent than {other}: the fingerprints differ" in refused(other, f"plan={plan}")


# ---------------------------------------------------------------- the program itself


def test_the_program_writes_and_proves_and_its_codes_tell(top8_parent: Path, tmp_path: Path) -> None:
    source, target = f"source={top8_parent}", tmp_path / "child"
    done = moexpand("upcycle", source, f"target={target}", "num_experts=128", SHARDS)
    assert (done.returncode, done.stderr) == (DONE, "")
    tensors = len(open_checkpoint(target).tensors)
    wrote = rf"Wrote {tensors} tensors in \d+ shards: [\d,]+ bytes read, [\d,]+ written in [\d.]+ s \(\d+ MB/s\)\."
    assert re.search(wrote, done.stdout)
    assert f"Prove it with: moexpand verify {source} target={target}" in done.stdout
    done = moexpand("verify", source, f"target={target}")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert "is exactly what its plan makes of" in done.stdout
    assert "Its map is what its placement calls for." in done.stdout
    info = open_checkpoint(target).info("model.layers.1.mlp.experts.77.up_proj.weight")
    with open(info.file, "r+b") as file:
        file.seek(info.start + 5)
        file.write(b"\x01\x02\x03")
    assert sentence(moexpand("verify", source, f"target={target}"), 1).startswith(
        f"{info.name} differs from the parent's up_proj"
    )
    assert "is not a folder" in sentence(moexpand("verify", f"source={tmp_path / 'none'}", f"target={target}"), 2)
    assert "holds no expansion.json" in sentence(moexpand("verify", source, source.replace("source", "target")), 2)


def test_on_a_terminal_there_is_a_bar_that_ends_full(top8_parent: Path, tmp_path: Path) -> None:
    for words in (
        ["upcycle", f"source={top8_parent}", f"target={tmp_path / 'child'}", "num_experts=128"],
        ["verify", f"source={top8_parent}", f"target={tmp_path / 'child'}"],
    ):
        code, shown = _on_a_terminal(words)
        assert code == DONE, shown
        assert "100%" in shown
        assert ("expanding" if words[0] == "upcycle" else "verifying") in shown


def _on_a_terminal(words: list[str]) -> tuple[int, str]:
    main_end, child_end = pty.openpty()
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    command = [sys.executable, "-m", "moexpand", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=child_end, stdout=child_end, stderr=child_end) as process:
        os.close(child_end)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 65536)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not part:
                break
            shown += part
    os.close(main_end)
    return process.returncode, shown.decode()
