"""`moexpand upcycle` with another tokenizer: rows, ids of special tokens and files follow the tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from moexpand.base.errors import DONE
from tests import closed_form
from tests.parents import TINY, make_parent
from tests.trained_tokenizers import TEXTS
from tests.upcycle.conftest import Run
from tests.upcycle.expanding import hashes


@pytest.fixture(scope="module")
def speaking_parent(tmp_path_factory: pytest.TempPathFactory, tokenizer_folders: dict[str, Path]) -> Path:
    """A parent with a real tokenizer, three padding rows and the ids of its special tokens in config.json."""
    old = Tokenizer.from_file(str(tokenizer_folders["old"] / "tokenizer.json"))
    shape = TINY | {"experts": 8, "top_k": 4, "vocab": old.get_vocab_size() + 3}
    folder = make_parent(tmp_path_factory.mktemp("speaking") / "parent", **shape)
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": old.token_to_id("<|im_start|>"), "eos_token_id": old.token_to_id("<|im_end|>"), "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | ids))
    shutil.copyfile(tokenizer_folders["old"] / "tokenizer.json", folder / "tokenizer.json")
    (folder / "README.md").write_text("a parent")
    return folder


GROWN = ["num_experts=32", "num_groups=4", "placement=block"]


def test_a_grown_vocabulary_moves_rows_ids_and_tokenizer(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    source, target, new_folder = f"source={speaking_parent}", tmp_path / "child", tokenizer_folders["inserted"]
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (speaking_parent, new_folder))
    size = new.get_vocab_size() + 10
    code, out, _ = run("upcycle", source, f"target={target}", *GROWN, f"tokenizer={new_folder}", f"vocab_size={size}")
    assert code == DONE
    rows = old.get_vocab_size() + 3
    assert (
        f"vocabulary {rows:,} -> {size:,} rows: {old.get_vocab_size()} moved with their tokens, 2 averaged from pieces, " in out
    )
    config = json.loads((target / "config.json").read_text())
    assert config["vocab_size"] == size
    assert config["eos_token_id"] == new.token_to_id("<|im_end|>") != old.token_to_id("<|im_end|>")
    assert config["bos_token_id"] == new.token_to_id("<|im_start|>")
    assert (target / "tokenizer.json").read_bytes() == (new_folder / "tokenizer.json").read_bytes()
    assert (target / "README.md").read_text() == "a parent"
    ours, theirs = closed_form.weights_of(target), closed_form.weights_of(speaking_parent)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[name].shape == (size, 32)
        for token, number in new.get_vocab().items():
            if (ancestor := old.token_to_id(token)) is not None:
                assert (ours[name][number] == theirs[name][ancestor]).all()
        pieces = old.encode("<think>", add_special_tokens=False).ids
        assert ours[name][new.token_to_id("<think>")] == pytest.approx(theirs[name][pieces].mean(0), abs=1e-6)
        assert ours[name][-1] == pytest.approx(theirs[name][: old.get_vocab_size()].mean(0), abs=1e-6)
    code, out, _ = run("verify", source, f"target={target}")
    assert code == DONE


def test_a_child_with_permuted_tokens_speaks_as_one_without(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    """The same text gets the same logits, each under the id that its token has now."""
    tokenizers, logits = {}, {}
    for name, words in (("old", []), ("permuted", [f"tokenizer={tokenizer_folders['permuted']}"])):
        target = tmp_path / name
        assert run("upcycle", f"source={speaking_parent}", f"target={target}", *GROWN, *words)[0] == DONE
        tokenizers[name] = Tokenizer.from_file(str(target / "tokenizer.json"))
        model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
        with torch.no_grad():
            logits[name] = model(torch.tensor([tokenizers[name].encode(TEXTS[0]).ids])).logits[0]
    vocabulary = tokenizers["old"].get_vocab()
    moved = [tokenizers["permuted"].token_to_id(token) for token in vocabulary]
    assert moved != list(vocabulary.values())
    assert torch.equal(logits["old"][:, list(vocabulary.values())], logits["permuted"][:, moved])


def test_a_plan_with_a_vocabulary_takes_its_own_tokenizer_alone(
    speaking_parent: Path, tokenizer_folders: dict[str, Path], run: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    plan, source = tmp_path / "plan.json", f"source={speaking_parent}"
    mine = f"tokenizer={tokenizer_folders['inserted']}"
    assert run("upcycle", source, f"target={tmp_path / 'one'}", *GROWN, mine, "vocab_size=450", f"plan_out={plan}")[0] == DONE
    assert run("upcycle", source, f"target={tmp_path / 'two'}", f"plan={plan}", mine)[0] == DONE
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    other = tokenizer_folders["permuted"]
    says = f"tokenizer={other} is not the one that plan={plan} was made with; give that one"
    assert says in refused(speaking_parent, f"plan={plan}", f"tokenizer={other}")
    code, out, _ = run("upcycle", source, f"target={tmp_path / 'three'}", f"plan={plan}")
    assert code == DONE
    assert "WARNING: the child's vocabulary is its own, and no tokenizer was given" in out
    assert not (tmp_path / "three" / "tokenizer.json").exists()
    assert run("verify", source, f"target={tmp_path / 'three'}")[0] == DONE
