"""A Qwen parent grows to 155,008 rows: its tokens keep their rows, pieces of sequences begin as the mean of what wrote them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moexpand.base.errors import DONE
from moexpand.data.save_tokenizer import main as save
from moexpand.data.science_tokenizer import SPECIALS
from moexpand.data.tokens import load_tokenizer
from moexpand.upcycle.tokenizer_files import read_tokens
from moexpand.upcycle.vocabulary import growth_for
from tests import closed_form
from tests.parents import TINY, make_parent
from tests.upcycle.conftest import Run

ROWS = 155008


@pytest.fixture(scope="module")
def science(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "science"
    assert save(["qwen-science", str(folder)]) == DONE
    return folder


@pytest.fixture(scope="module")
def qwen_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Qwen's vocabulary, its 267 padding rows among it."""
    folder = make_parent(
        tmp_path_factory.mktemp("qwen") / "parent", **TINY | {"top_k": 4, "vocab": 151936, "max_shard_size": "20MB"}
    )
    load_tokenizer("qwen").save(folder)
    return folder


def test_every_id_is_read_as_what_it_stands_for(science: Path) -> None:
    tokenizer, tokens = load_tokenizer(str(science)), read_tokens(science)
    assert sorted(tokens) == list(range(154766))
    ids = tokenizer.encode("<SMILES>CC(=O)O</SMILES><dna>GATTACA</dna>")
    assert "".join(tokens[number].text for number in ids) == "<SMILES>CC(=O)O</SMILES><dna>GATTACA</dna>"
    assert {tokens[number].domain for number in ids} == {"", "SMILES", "XNA"}


def test_a_qwen_parent_grows_by_the_written_rule(science: Path, qwen_parent: Path) -> None:
    growth = growth_for(qwen_parent, 151936, science, ROWS)
    assert growth is not None
    assert growth.sources[:151669] == tuple(range(151669))
    qwen, tokens = load_tokenizer("qwen"), read_tokens(science)
    pieces = [number for number, token in tokens.items() if token.domain and token.text]
    assert len(pieces) == 3 * 1023
    for number in [*pieces[::50], 151669, 151684]:
        assert growth.sources[number] == tuple(qwen.encode(tokens[number].text)), tokens[number].name
    filled = [number for number in range(ROWS) if growth.sources[number] is None]
    assert filled == [151694, 152718, 153742, *range(154766, ROWS)]  # <unk> of each domain, and rows without a token
    assert (growth.moved, growth.averaged, growth.filled) == (151669, 3069 + len(SPECIALS), 245)
    assert growth.dropped == 0


def test_the_command_writes_these_rows_and_a_tokenizer_that_fits(
    science: Path, qwen_parent: Path, run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "child"
    words = ["num_experts=32", "num_groups=4", "placement=block", f"tokenizer={science}", f"vocab_size={ROWS}"]
    code, out, _ = run("upcycle", f"source={qwen_parent}", f"target={target}", *words)
    assert code == DONE
    assert "151,669 moved with their tokens, 3,094 averaged from pieces, 245 filled with the mean of all; 0 of" in out
    assert json.loads((target / "config.json").read_text())["vocab_size"] == ROWS
    old, new, qwen = closed_form.weights_of(qwen_parent), closed_form.weights_of(target), load_tokenizer("qwen")
    child = load_tokenizer(str(target))
    assert child.fingerprint == load_tokenizer("qwen-science").fingerprint
    (piece,) = child.encode("<SMILES>CC</SMILES>")[1:-1]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (ROWS, 32)
        assert np.array_equal(new[name][:151669], old[name][:151669])
        for number, text in ((piece, "CC"), (151683, "<|ts|>")):
            assert np.allclose(new[name][number], old[name][qwen.encode(text)].mean(0, dtype=np.float64))
        assert np.allclose(new[name][ROWS - 1], old[name][:151669].mean(0, dtype=np.float64))
    code, out, _ = run("verify", f"source={qwen_parent}", f"target={target}")
    assert code == DONE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vocab_size=154000"], ("id 154765", "154000 rows", "vocab_size=154766 or more")),
        ([], ("id 154765", "151936 rows", "vocab_size=154766 or more")),
    ],
)
def test_too_few_rows_are_refused_with_the_number_needed(
    science: Path, qwen_parent: Path, run: Run, tmp_path: Path, words: list[str], said: tuple[str, ...]
) -> None:
    code, _, error = run("upcycle", f"source={qwen_parent}", f"target={tmp_path / 'child'}", f"tokenizer={science}", *words)
    assert code == 2
    assert all(word in error for word in (str(science), *said)), error


def test_a_tokenizer_whose_files_do_not_fit_is_refused(science: Path, qwen_parent: Path, run: Run, tmp_path: Path) -> None:
    for broken, said in (
        ("offset", "sp_model_PROT.offset"),
        ("model", "is not a SentencePiece model"),
        ("gap", "gives id 153742 to both"),
    ):
        copy = Path(shutil.copytree(science, tmp_path / broken))
        code, model = next(copy.glob("tokenization_*.py")), copy / "tokenizer_PROT.model"
        if broken == "offset":
            code.unlink()
        elif broken == "model":
            model.write_bytes(model.read_bytes()[:-100])
        else:
            code.write_text(code.read_text().replace("offset = 152718", "offset = 152719"))
        words = [f"target={tmp_path / 'child'}", f"tokenizer={copy}", f"vocab_size={ROWS}"]
        exit_code, _, error = run("upcycle", f"source={qwen_parent}", *words)
        assert exit_code == 2
        assert str(copy) in error
        assert said in error
        assert not (tmp_path / "child").exists()
