"""What each id stands for is read from a tokenizer's files, whichever of them there are."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moexpand.base.errors import InputError
from moexpand.upcycle.tokenizer_files import read_tokens, tokenizer_files
from moexpand.upcycle.vocabulary import grow
from tests.trained_tokenizers import SPECIALS, domain_tokenizer


def test_files_without_tokenizer_json_say_the_same(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """vocab.json and merges.txt with added tokens in either of their two files, as slow tokenizers are saved."""
    old = Tokenizer.from_file(str(tokenizer_folders["old"] / "tokenizer.json"))
    old.model.save(str(tmp_path))
    added = {name: old.token_to_id(name) for name in SPECIALS}
    (tmp_path / "added_tokens.json").write_text(json.dumps({SPECIALS[0]: added[SPECIALS[0]]}))
    decoder = {str(number): {"content": name, "special": True} for name, number in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert read_tokens(tmp_path) == read_tokens(tokenizer_folders["old"])
    size = old.get_vocab_size()
    assert grow(tmp_path, tokenizer_folders["other"], size, 600) == grow(
        tokenizer_folders["old"], tokenizer_folders["other"], size, 600
    )
    assert {token.name: number for number, token in read_tokens(tmp_path).items()} == old.get_vocab()
    names = [file.name for file in tokenizer_files(tmp_path)]
    assert names == ["added_tokens.json", "merges.txt", "tokenizer_config.json", "vocab.json"]


def test_pieces_of_a_domain_move_within_it(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """Intern-S1 and its successor keep vocabularies of molecules and proteins beside the main one, at other offsets."""
    base = tokenizer_folders["old"]
    old = domain_tokenizer(base, tmp_path / "old", {"SMILES": (500, ["C", "=O", "CC("]), "FASTA": (504, ["M", "K"])})
    new = domain_tokenizer(base, tmp_path / "new", {"SMILES": (520, ["=O", "C", "c1ccc"]), "PROT": (540, ["M", "MK"])})
    growth = grow(old, new, 600, 600)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    encode, own = tokenizer.encode, tokenizer.token_to_id("M")
    assert growth.sources[520:524] == (500, 502, 501, tuple(encode("c1ccc").ids))
    assert growth.sources[540:543] == (None, tuple(encode("M").ids), tuple(encode("MK").ids))
    assert growth.dropped_names == ("<|FASTA_<unk>|>", "<|FASTA_M|>", "<|FASTA_K|>", "<|SMILES_CC(|>")
    assert growth.sources[own] == own != 505
    from_qwen = grow(base, new, 600, 600)
    assert from_qwen.sources[521:524] == tuple(tuple(encode(piece).ids) for piece in ("=O", "C", "c1ccc"))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model": {}}', '{"model": {"vocab": {}}}', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": [1]}}'],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        read_tokens(tmp_path)


def test_damaged_added_tokens_are_named(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    shutil.copytree(tokenizer_folders["old"], tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text('{"<x>": "many"}')
    with pytest.raises(InputError, match="added tokens of the tokenizer in"):
        read_tokens(tmp_path / "t")


def test_a_domain_whose_ids_are_unknown_is_refused(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    folder = domain_tokenizer(tokenizer_folders["old"], tmp_path / "t", {"SMILES": (500, ["C"])})
    (folder / "tokenization_interns1.py").unlink()
    with pytest.raises(InputError, match=r"tokenizer_SMILES\.model has ids of its own.*vocab_map"):
        read_tokens(folder)
    overlapping = domain_tokenizer(tokenizer_folders["old"], tmp_path / "o", {"SMILES": (3, ["C"])})
    with pytest.raises(InputError, match="id 3 to both"):
        read_tokens(overlapping)
    (folder / "tokenizer_SMILES.model").write_bytes(b"\x0a\xff\xff")
    (folder / "tokenization_interns1.py").write_text("sp_model_SMILES.offset = 500")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        read_tokens(folder)
