"""Shards with tagged sequences train as any others, and a model with too few rows for them is refused with both numbers."""

import json
from pathlib import Path

import pytest

from moexpand.data.tokens import load_tokenizer
from tests.commands import moexpand, sentence
from tests.data.sequences import in_a_text
from tests.train.conftest import settings

CHAT = [
    {"role": "user", "content": "What is <SMILES>CCO</SMILES>?"},
    {"role": "assistant", "content": "Ethanol, <SMILES>CCO</SMILES>."},
]


@pytest.fixture(scope="module")
def science_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text full of sequences and a conversation, built by the command."""
    folder = tmp_path_factory.mktemp("science")
    rows: list[dict[str, object]] = [{"text": in_a_text()}, {"messages": CHAT}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = moexpand(
        "data", "build", f"sources=[{folder / 'rows.jsonl'}]", f"out={folder / 'shards'}", "tokenizer=qwen-science",
        "workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def test_shards_hold_the_pieces_of_sequences_in_texts_and_conversations(science_shards: Path) -> None:
    summary = json.loads((science_shards / "dataset.json").read_text())
    tokenizer = load_tokenizer("qwen-science")
    found = summary["tokenizer"]
    assert (found["fingerprint"], found["vocab_size"]) == (tokenizer.fingerprint, 155008)
    of_the_chat = summary["tokens"] - len(tokenizer.encode(in_a_text()))
    assert 20 < of_the_chat < 40
    done = moexpand("data", "inspect", f"shards={science_shards}")
    assert "2 samples" in done.stdout
    assert "of qwen-science" in done.stdout


@pytest.mark.layouts
def test_two_steps_on_155_008_rows(science_shards: Path, tmp_path: Path) -> None:
    done = moexpand(*settings(science_shards, tmp_path / "run", model__vocab_size=155008, train__steps=2))
    assert done.returncode == 0, done.stderr
    target = tmp_path / "exported"
    done = moexpand("export", f"run={tmp_path / 'run'}", f"target={target}")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(str(target)).fingerprint == load_tokenizer("qwen-science").fingerprint
    assert json.loads((target / "config.json").read_text())["vocab_size"] == 155008


def test_a_model_of_qwen_s_size_is_refused(science_shards: Path, tmp_path: Path) -> None:
    done = moexpand(*settings(science_shards, tmp_path / "run", model__vocab_size=151936))
    said = sentence(done, 2)
    assert all(word in said for word in ("155,008", "151,936", str(science_shards), "vocab_size=155008"))
