"""`moexpand convert` as a user runs it: what it says, what it writes, what it measures, what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands import moexpand
from tests.parents import make_parent
from tests.train.conftest import from_checkpoint, settings

TOWER = [
    "tower=fresh", "vision.depth=1", "vision.hidden_size=16", "vision.intermediate_size=32", "vision.num_heads=2",
    "vision.patch_size=4", "vision.num_position_embeddings=16", "vision.image_token_id=8204",
]  # fmt: skip
MEASURED = re.compile(r"Step 0 on ([\d,]+) tokens: loss ([\d.]+) -> ([\d.]+) \(([+-][\d.]+) \+- ([\d.]+)\)")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "text"
    return make_parent(folder, experts=16, top_k=4, vocab=8448)


def told(source: Path, target: Path, *words: str) -> Any:
    done = moexpand("convert", f"source={source}", f"target={target}", *words, "plain=true")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.layouts
def test_the_damage_is_measured_and_compensation_is_most_of_it(text: Path, shards: Path, tmp_path: Path) -> None:
    """max_position_embeddings=512 of the parent leaves out pairs that turn little; left uncompensated they count twice."""
    fope = ["family=interns1_pro", "positions=fope", *TOWER, f"measure.shards={shards}", "measure.tokens=1000"]
    changes = {}
    for name, more in (
        ("compensated", []),
        ("plain", ["compensate=false"]),
        ("two ranks", ["compensate=false", "processes=2", "parallel.expert=2"]),
    ):
        said = told(text, tmp_path / name.replace(" ", "-"), *fope, *more, "measure.seq_length=128")
        found = MEASURED.search(said)
        assert found is not None, said
        assert int(found[1].replace(",", "")) >= 1000
        assert float(found[3]) - float(found[2]) == pytest.approx(float(found[4]), abs=2e-4)
        changes[name] = float(found[4])
        assert "FoPE keeps" in said
        assert "The vision tower is fresh" in said
    assert abs(changes["compensated"]) < abs(changes["plain"])
    assert changes["two ranks"] == pytest.approx(changes["plain"], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compensated", "plain", "two-ranks"], "nothing else is left"


@pytest.mark.layouts
def test_a_converted_model_is_expanded_and_trained(text: Path, shards: Path, tmp_path: Path) -> None:
    told(text, tmp_path / "pro", "family=interns1_pro", "positions=fope", *TOWER)
    done = moexpand(
        "upcycle", f"source={tmp_path / 'pro'}", f"target={tmp_path / 'child'}", "num_experts=64", "num_groups=4",
        "placement=halves_tile",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "child" / "config.json").read_text())["model_type"] == "interns1_pro"
    assert moexpand("verify", f"source={tmp_path / 'pro'}", f"target={tmp_path / 'child'}").returncode == 0
    words = settings(
        shards, tmp_path / "run", **from_checkpoint(tmp_path / "child"), **{"train.steps": 3, "vision.warmup_steps": 1}
    )
    done = moexpand(*words)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "so nothing would change"),
        (["family=interns1_pro"], "give tower=fresh"),
        (
            ["family=interns1_pro", "positions=fope", *TOWER, "vision.num_position_embeddings=15"],
            "vision.num_position_embeddings=15",
        ),
        (["family=interns1_pro", "vision.depth=2"], "vision.depth=2 is the size of a fresh tower; give tower=fresh as well"),
        (
            ["family=interns1_pro", *TOWER, "vision.deepstack_visual_indexes=[0]"],
            "vision.deepstack_visual_indexes=[0] is for Qwen3-VL's kind",
        ),
        (["family=interns1_pro", *TOWER, "measure.tokens=9"], "measure.tokens=9 is for measuring and nothing is measured"),
        (["family=interns1_pro", *TOWER, "processes=2", "parallel=ep2"], "parallel.expert=2 is for measuring"),
        (["family=interns1_pro", *TOWER, "processes=2"], "processes=2 is for measuring and nothing is measured"),
        (["family=interns1_pro", *TOWER, "precision=bf16"], "precision.name=bf16 is for measuring"),
        (["family=qwen3_vl"], "is not among same, qwen3_moe, interns1_pro"),
        (["family=interns1_pro", *TOWER, "measure.shards=/nowhere"], "/nowhere"),
        (["family=interns1_pro", *TOWER, "measure.shards=/nowhere", "parallel.tensor=3", "processes=3"], "parallel.tensor=3"),
    ],
)
def test_what_cannot_be_converted_is_said_before_anything_is_written(
    text: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    done = moexpand("convert", f"source={text}", f"target={tmp_path / 'out'}", *words)
    assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
