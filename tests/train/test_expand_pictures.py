"""A Qwen3-VL-MoE that is expanded while it is loaded trains on pictures as its written child does, from step 0 on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_here
from tests.processes import run_on_ranks
from tests.train.conftest import from_checkpoint, settings
from tests.train.pictures import IMAGE_PAD, PIXELS, picture_shards
from tests.train.workers import train_on_ranks
from tests.upcycle.vl_parent import parent_model

VOCABULARY = 8448


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_shards(tmp_path_factory.mktemp("pictured"))


def make_parent(folder: Path, image_token: int) -> Path:
    """With DeepStack and stacks of experts; 8 x 8 pixels a token."""
    parent_model(dense=(), vocab_size=VOCABULARY).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": image_token}))
    return folder


def rows(run: Path, table: str) -> list[dict[str, Any]]:
    """Without times and memory."""
    found = [json.loads(line) for line in (run / table).read_text().splitlines()]
    own = ("second", "time", "memory")
    return [{key: value for key, value in row.items() if not any(word in key for word in own)} for row in found]


@pytest.mark.parametrize("moved", [False, True], ids=["its own vocabulary", "moved tokens"])
def test_the_held_out_loss_at_step_0_is_that_of_the_written_child(moved: bool, pictured: Path, tmp_path: Path) -> None:
    """With moved tokens the parent's pictures stand at another token than those of the child and the shards."""
    plan, child, asked = tmp_path / "plan.json", tmp_path / "child", ["num_experts=32", "num_groups=4", "plain=true"]
    parent = make_parent(tmp_path / "parent", VOCABULARY - 1 - IMAGE_PAD if moved else IMAGE_PAD)
    if moved:
        (tmp_path / "ids.json").write_text(json.dumps([*reversed(range(VOCABULARY))]))
        asked.append(f"vocab_map={tmp_path / 'ids.json'}")
    assert run_here("upcycle", f"source={parent}", f"target={child}", *asked, f"plan_out={plan}") == 0
    changes: dict[str, Any] = {
        "train.steps": 2, "evaluate.every": 2, "data.held_out": 0.2, "save.every": 0, "track.routing_every": 0, **PIXELS,
    }  # fmt: skip
    loaded, written, unseen = tmp_path / "loaded", tmp_path / "written", tmp_path / "unseen"
    commands = [
        settings(pictured, loaded, **from_checkpoint(parent), **changes, expand=plan),
        settings(pictured, written, **from_checkpoint(child), **changes),
        settings(pictured, unseen, **from_checkpoint(child), **changes | dict.fromkeys(PIXELS), **{"data.images": "off"}),
    ]
    run_on_ranks(train_on_ranks, 2, commands)
    evaluations = rows(loaded, "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]
    assert evaluations == rows(written, "evaluations.jsonl")
    assert evaluations[0]["held_out_loss"] != rows(unseen, "evaluations.jsonl")[0]["held_out_loss"]
    assert rows(loaded, "metrics.jsonl") == rows(written, "metrics.jsonl")
