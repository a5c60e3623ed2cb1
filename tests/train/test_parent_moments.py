"""`optim.moments`: a child of `train` begins with the moments of its parent's run, once, and says so."""

import shutil
from pathlib import Path

import pytest

from tests.commands import moexpand, sentence
from tests.train.conftest import STEPS, from_checkpoint, settings
from tests.train.faults import rows


@pytest.fixture(scope="module")
def plan(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for 256 experts in 4 groups."""
    out = tmp_path_factory.mktemp("inheritance") / "plan.json"
    words = ["num_experts=256", "num_groups=4", "router_noise=0", "dry_run=true", f"plan_out={out}"]
    done = moexpand("upcycle", f"source={exported}", f"target={out.parent / 'child'}", *words)
    assert done.returncode == 0, done.stderr
    return out


def words(shards: Path, run: Path, exported: Path, plan: Path, **changes: object) -> list[str]:
    given = from_checkpoint(exported) | {"expand": plan, "train__steps": 3, "save__every": 2, **changes}
    return settings(shards, run, **given)


@pytest.mark.layouts
def test_a_child_begins_with_its_parents_moments_once(
    shards: Path, straight: Path, exported: Path, plan: Path, tmp_path: Path
) -> None:
    curves = {}
    for moments in ("copy", "scale"):
        run = tmp_path / moments
        taken = {"optim__moments": moments, "optim__moments_from": straight}
        done = moexpand(*words(shards, run, exported, plan, **taken))
        assert done.returncode == 0, done.stderr
        told = f"Adam's moments are those of {straight / 'checkpoints' / f'step_{STEPS:07d}'}"
        assert told in done.stdout
        curves[moments] = [row["loss"] for row in rows(run)]
    assert curves["copy"][0] == curves["scale"][0]
    assert curves["copy"][1:] != curves["scale"][1:]

    longer = words(shards, tmp_path / "scale", exported, plan, train__steps=4)
    longer += ["optim.moments=scale", f"optim.moments_from={straight}"]
    on = moexpand(*longer)
    assert on.returncode == 0, on.stderr
    assert "Adam's moments" not in on.stdout


def test_what_cannot_be_taken_over_is_told(shards: Path, straight: Path, exported: Path, plan: Path, tmp_path: Path) -> None:
    def refused(code: int, **changes: object) -> str:
        return sentence(moexpand(*words(shards, tmp_path / "run", exported, plan, **changes)), code)

    assert "needs the parent's run" in refused(2, optim__moments="copy")
    assert "is not read with optim.moments=reset" in refused(2, optim__moments_from=straight)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no checkpoint" in refused(2, optim__moments="copy", optim__moments_from=empty)
    assert not (tmp_path / "run").exists()

    damaged = tmp_path / "damaged"
    shutil.copytree(straight / "checkpoints", damaged / "checkpoints")
    shard = next((damaged / "checkpoints" / f"step_{STEPS:07d}").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "does not have the checksum" in refused(3, optim__moments="copy", optim__moments_from=damaged)
