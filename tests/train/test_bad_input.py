"""Wrong input ends with its exit code and one sentence that names what is at fault, before anything is written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import moexpand, sentence
from tests.parents import make_parent
from tests.train.conftest import from_checkpoint, settings


@pytest.fixture
def refused(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `train` with changed settings in this process; returns its sentence and shows that no run folder was made."""
    from moexpand.cli import main

    def run(**changes: object) -> str:
        folder = tmp_path / "run"
        capsys.readouterr()  # what was said before
        code = main(settings(shards, folder, **changes))
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert not folder.exists()
        return lines[0]

    return run


def test_missing_shards_are_named(shards: Path, tmp_path: Path) -> None:
    done = moexpand(*settings(tmp_path / "nowhere", tmp_path / "run"))
    assert str(tmp_path / "nowhere") in sentence(done, 2)
    assert not (tmp_path / "run").exists()


def test_a_shard_that_is_gone_is_named(refused: Any, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    shard = next(copy.glob("*.tar"))
    shard.unlink()
    assert shard.name in refused(**{"data.shards": copy})


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(refused: Any, tmp_path: Path) -> None:
    parent = make_parent(tmp_path / "parent", experts=16, hidden=32, layers=2)
    said = refused(**from_checkpoint(parent))
    assert "8,448" in said
    assert "256" in said


def test_another_tokenizer_than_the_shards_own_is_refused(refused: Any) -> None:
    assert "qwen-8192" in refused(data__tokenizer="qwen")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel.expert": 3}, ("parallel.expert", "2 ranks")),
        ({"parallel.tensor": 2, "parallel.pipeline": 2}, ("parallel.tensor", "parallel.pipeline", "4")),
        ({"parallel.expert": 2, "model.num_experts": 9}, ("num_experts=9", "parallel.expert=2")),
        ({"parallel.pipeline": 2, "parallel.expert": 1, "model.num_hidden_layers": 3}, ("num_hidden_layers=3",)),
        ({"parallel.dispatcher": "grouped_allgather"}, ("grouped_allgather", "router_n_groups=1")),
        ({"model.router_n_groups": 3}, ("router_n_groups=3",)),
        ({"parallel.interleave": 2}, ("parallel.interleave=2",)),
        ({"train.global_batch": 3}, ("train.global_batch=3",)),
        ({"parallel.tensor": 2, "train.seq_length": 63}, ("train.seq_length=63",)),
        ({"parallel.experts": 2}, ("parallel.experts", "parallel.expert")),
        ({"train.steps": "many"}, ("train.steps",)),
        (from_checkpoint(Path("/nowhere/model")), ("/nowhere/model is not a folder",)),
        (
            {"checkpoint": "/nowhere/model"},
            ("model.hidden_size=32", "checkpoint=/nowhere/model", "leave model=... and model.* out"),
        ),
        ({"model.vision.depth": 2}, ("model.vision.depth=2 is for model.family=qwen3_vl_moe or interns1_pro", "leave it out")),
    ],
    ids=lambda value: " ".join(name for name in value if value[name] is not None) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused_before_anything_starts(
    refused: Any, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    said = refused(**changes)
    for word in words:
        assert word in said


def test_a_truncated_weights_file_is_named(refused: Any, exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    file = next(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in refused(**from_checkpoint(copy))


def test_export_does_not_write_over_a_folder(straight: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert str(tmp_path) in sentence(moexpand("export", f"run={straight}", f"target={tmp_path}"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


TOKENS: dict[str, tuple[Any, str]] = {
    "missing": (None, "does not exist"),
    "text": (b"hello", "not a .npy file"),
    "floats": (np.zeros((1, 4)), "float64 [1, 4]"),
    "one row": (np.zeros(4, dtype=np.int64), "int64 [4]"),
    "empty": (np.zeros((0, 4), dtype=np.int64), "[0, 4]"),
    "too large": (np.array([[0, 8448]]), "8448"),
    "negative": (np.array([[-1, 5]]), "-1"),
    "objects": (np.array([[{}]], dtype=object), "tokens.npy"),
}


@pytest.mark.parametrize("name", list(TOKENS))
def test_wrong_tokens_are_said_to_be_wrong(exported: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    from moexpand.cli import main

    content, words = TOKENS[name]
    path, out = tmp_path / "tokens.npy", tmp_path / "out.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    assert main(["logits", f"checkpoint={exported}", f"tokens={path}", f"out={out}"]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_an_impossible_layout_of_logits_is_refused_before_workers_start(exported: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((1, 4), dtype=np.int64))
    words = ("logits", f"checkpoint={exported}", f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'out.npy'}")
    assert "parallel.expert" in sentence(moexpand(*words, "processes=2", "parallel.expert=3"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


def test_where_logits_cannot_be_written_the_environment_is_at_fault(exported: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((1, 4), dtype=np.int64))
    out = tmp_path / "nowhere" / "out.npy"
    assert str(out) in sentence(
        moexpand("logits", f"checkpoint={exported}", f"tokens={tmp_path / 'tokens.npy'}", f"out={out}"), 3
    )


@pytest.mark.layouts
def test_a_damaged_sample_is_named_once_and_stops_the_run_unless_allowed(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    tar = next(damaged.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    at = content.index(b"Text 7.")
    content[at] ^= 1
    tar.write_bytes(content)
    few = {"train__steps": 30, "save__every": 0, "launch__processes": 1, "parallel__expert": 1}
    strict = moexpand(*settings(damaged, tmp_path / "strict", **few))
    assert strict.returncode == 2, strict.stderr
    tolerant = moexpand(*settings(damaged, tmp_path / "tolerant", **few, data__max_bad_fraction=0.5))
    assert tolerant.returncode == 0, tolerant.stderr
    warnings = [line for line in tolerant.stdout.splitlines() if line.startswith("WARNING: sample")]
    assert len(warnings) == 1
    assert "checksum" in warnings[0] or "CRC" in warnings[0], warnings
