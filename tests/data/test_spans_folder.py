"""A saved science tokenizer is an ordinary folder: the same ids through moexpand, through transformers, and after a copy."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moexpand.base.errors import InputError
from moexpand.data.spans import TAGS, SpanTokenizer
from moexpand.data.tokens import Tokenizer, load_tokenizer
from tests.data.conftest import write_jsonl
from tests.data.sequences import TAGGED, in_a_text
from tests.data.test_tokens import TEXTS

SMALL = "qwen-8192-science"
CODE = "tokenization_spans_moexpand.py"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SMALL)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("science")
    tokenizer.save(place)
    return place


@pytest.fixture(scope="module")
def auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(("name", "padded", "tokens_in_all"), [(SMALL, 11392, 11315), ("qwen-science", 155008, 154766)])
def test_saved_folder_gives_the_same_ids_in_moexpand_and_transformers(
    name: str, padded: int, tokens_in_all: int, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(name)
    tokenizer.save(tmp_path)
    folder = load_tokenizer(str(tmp_path))
    auto = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(folder, SpanTokenizer)
    for text in [*TEXTS, in_a_text(), "<dna>no</dna> <rna>GGC <SMILES>CC</SMILES>"]:
        ids = tokenizer.encode(text)
        assert ids == folder.encode(text) == auto.encode(text)
        assert tokenizer.decode(ids) == folder.decode(ids) == auto.decode(ids)
    assert (tokenizer.vocab_size, folder.vocab_size, len(auto)) == (padded, tokens_in_all, tokens_in_all)
    assert tokenizer.eos_id == folder.eos_id == auto.eos_token_id
    assert folder.fingerprint == tokenizer.fingerprint
    assert folder.specials == tokenizer.specials


parts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]),
    st.sampled_from([f"<{tag}>{inside}</{tag}>" for tag, found in TAGGED.items() for inside in found]),
    st.sampled_from([inside for found in TAGGED.values() for inside in found]),
)


def test_transformers_agrees_on_any_text(tokenizer: Tokenizer, folder: Path, auto: Any) -> None:
    again = load_tokenizer(str(folder))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(parts).map("".join))
    def agree(text: str) -> None:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        # Names of special tokens become these tokens in transformers, and are plain text here.
        if not any(special in text for special in tokenizer.specials):
            assert auto.encode(text) == ids
        assert auto.decode(ids) == tokenizer.decode(ids)

    agree()


def test_transformers_keeps_special_tokens_and_the_chat_template(tokenizer: Tokenizer, auto: Any) -> None:
    message = {"role": "user", "content": "What is <SMILES>CCO</SMILES>?"}
    text = auto.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is <SMILES>CCO</SMILES>?<|im_end|>\n<|im_start|>assistant\n"
    ids = auto.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
    start, end = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
    said = tokenizer.encode("user\nWhat is <SMILES>CCO</SMILES>?")
    assert ids == [start, *said, end, *tokenizer.encode("\n"), start, *tokenizer.encode("assistant\n")]
    assert auto.decode(ids, skip_special_tokens=True) == "user\nWhat is <SMILES>CCO</SMILES>?\nassistant\n"
    assert auto.convert_tokens_to_ids(auto.convert_ids_to_tokens(ids)) == ids
    assert auto(["<dna>ACGT</dna>", ""], padding=True)["attention_mask"][1] == [0] * len(auto.encode("<dna>ACGT</dna>"))


def test_what_transformers_or_moexpand_save_again_is_the_same_tokenizer(
    tokenizer: Tokenizer, folder: Path, auto: Any, tmp_path: Path
) -> None:
    auto.save_pretrained(tmp_path / "auto")
    (tmp_path / "copy").mkdir()
    load_tokenizer(str(folder)).save(tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == sorted(file.name for file in folder.iterdir())
    for copy in (tmp_path / "auto", tmp_path / "copy"):
        assert load_tokenizer(str(copy)).fingerprint == tokenizer.fingerprint
        assert AutoTokenizer.from_pretrained(copy, trust_remote_code=True).encode(in_a_text()) == tokenizer.encode(in_a_text())


def _damage(folder: Path) -> None:
    (folder / "tokenizer_PROT.model").write_bytes((folder / "tokenizer_PROT.model").read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "tokenizer_PROT.model").write_bytes(b"")


def _lose_the_code(folder: Path) -> None:
    (folder / CODE).unlink()


def _grow(folder: Path) -> None:
    """One more piece than the gap to the next domain, appended to the protocol buffer."""
    piece = b"\x0a\x03WWW\x15" + struct.pack("<f", -2000.0)
    with open(folder / "tokenizer_PROT.model", "ab") as file:
        file.write(b"\x0a" + bytes([len(piece)]) + piece)


def _move_into_the_text(folder: Path) -> None:
    code = (folder / CODE).read_text()
    (folder / CODE).write_text(code.replace("sp_model_SMILES.offset = 8243", "sp_model_SMILES.offset = 8242"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_damage, r"tokenizer_PROT\.model is not a SentencePiece model, or is damaged; copy it anew\.$"),
        (_empty, r"tokenizer_PROT\.model is not a SentencePiece model, or is damaged; copy it anew\.$"),
        (
            _lose_the_code,
            r"tokenizer_PROT\.model has ids of its own, and no Python file beside it says where they begin; copy the tokenizer's "
            r"tokenization_\*\.py with the line sp_model_PROT\.offset = \.\.\. into the folder\.$",
        ),
        (
            _grow,
            r"^Id 10291 is '<\|PROT_WWW\|>' of .*tokenizer_PROT\.model and '<\|XNA_<unk>\|>' of .*tokenizer_XNA\.model: these "
            r"files do not belong to one tokenizer, or an offset in its Python code is wrong; copy the folder anew\.$",
        ),
        (_move_into_the_text, r"^Id 8242 is '<\|reserved_11\|>' of .* and '<\|SMILES_<unk>\|>' of "),
    ],
    ids=["damaged", "empty", "no offsets", "too many pieces", "over the text's tokens"],
)
def test_files_that_do_not_belong_together_are_named(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(str(copy))
    assert str(copy) in str(caught.value)


def test_a_domain_without_tags_has_ids_and_no_spans(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer_XNA.model").rename(copy / "tokenizer_OTHER.model")
    code = (copy / CODE).read_text().replace("sp_model_XNA.offset = 10291", "sp_model_OTHER.offset = 20000")
    (copy / CODE).write_text(code)
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.vocab_size == 21024
    assert max(tokenizer.encode("<dna>ACGT</dna>")) < 8192
    assert tokenizer.decode([20001, 20002]) != ""


@pytest.mark.parametrize("command", ["build", "index"])
def test_data_commands_name_a_damaged_model_before_they_write(
    command: str, folder: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moexpand.cli import main

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    _damage(copy)
    rows = write_jsonl(tmp_path / "rows.jsonl", 2)
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copyfile(next(corpus.glob("*.tar")), tars / "shard-000000.tar")
    words = {"build": [f"sources=[{rows}]", f"out={tmp_path / 'out'}"], "index": [f"shards={tars}"]}[command]
    code = main(["data", command, *words, f"tokenizer={copy}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert f"{copy}/tokenizer_PROT.model is not a SentencePiece model" in line
    assert not (tmp_path / "out").exists()
    assert [file.name for file in tars.iterdir()] == ["shard-000000.tar"]
