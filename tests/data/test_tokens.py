"""Qwen's vocabulary, its prefix, and their Hugging Face form are one and the same tokenizer."""

import importlib.util
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data import tokens
from moexpand.data.tokens import QWEN_SPECIALS, load_tokenizer
from moexpand.data.tokens_save import merges_of_ranks

TEXTS = [
    "Hello world, it's a test of 12345 numbers: 3.14e-10.",
    "  leading and trailing  \n\n\t\ttabs\r\nand CRLF   ",
    "第三图显示了结果，随机森林的误差为0.5。你好，世界！",
    "for i in range(10):\n    print(f'{i:02d}')  # comment\n\n\nclass A:\n\tpass\n",
    "E\u0301 and ﬁ, e\u0301, Ångström Å, emoji 🙂👍🏽, zero width \u200b, BOM \ufeff, NUL \x00",
    "(x_1^2 + y_{2}) \\frac{\\partial L}{\\partial z} ≤ ∑ᵢ αᵢ·βᵢ",
    "",
]


@pytest.mark.parametrize(("name", "padded", "tokens_in_all"), [("qwen-8192", 8448, 8218), ("qwen", 151936, 151669)])
def test_saved_folder_gives_the_same_ids_in_tokenizers_and_transformers(name, padded, tokens_in_all, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(name)
    tokenizer.save(tmp_path)
    folder = load_tokenizer(str(tmp_path))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == folder.encode(text) == auto.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    assert (tokenizer.vocab_size, len(auto)) == (padded, tokens_in_all)
    assert tokenizer.eos_id == folder.eos_id == auto.eos_token_id == auto.convert_tokens_to_ids("<|endoftext|>")
    assert folder.fingerprint == tokenizer.fingerprint
    chat = auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_have_qwen_ids():
    specials = load_tokenizer("qwen").specials
    assert specials["<|endoftext|>"] == 151643
    assert specials["<|im_start|>"] == 151644
    assert specials["<|vision_start|>"] == 151652
    assert specials["<|image_pad|>"] == 151655
    assert specials["</think>"] == 151668
    assert len(QWEN_SPECIALS) == 26


def test_names_of_special_tokens_in_a_text_are_plain_text(tmp_path):
    tokenizer = load_tokenizer("qwen-8192")
    tokenizer.save(tmp_path)
    folder = load_tokenizer(str(tmp_path))
    for special in QWEN_SPECIALS:
        ids = tokenizer.encode(f"ignore {special} this")
        assert max(ids) < 8192
        assert folder.encode(f"ignore {special} this") == ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(text):
    tokenizer = load_tokenizer_once()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def load_tokenizer_once():
    """The same object for every example."""
    if not hasattr(load_tokenizer_once, "tokenizer"):
        load_tokenizer_once.tokenizer = load_tokenizer("qwen-8192")
    return load_tokenizer_once.tokenizer


def test_merges_of_a_hand_made_vocabulary():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"abab": 6}
    assert merges_of_ranks(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"ab", b"ab")]


def test_missing_vocabulary_names_the_pip_command(monkeypatch):
    tokens._qwen_ranks.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps dashscope==2\.0\.2"):
        load_tokenizer("qwen-8192")
    tokens._qwen_ranks.cache_clear()


def test_unknown_name_and_broken_file_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="is not one of qwen, qwen-8192, qwen-science, qwen-8192-science, and no folder"):
        load_tokenizer("qwen-9")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "nonsense"}}))
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_end_of_text_and_vocabulary_of_a_folder_come_from_its_files(tmp_path):
    load_tokenizer("qwen-8192").save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9000, "eos_token_id": 5}))
    assert load_tokenizer(str(tmp_path)).vocab_size == 9000
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(str(tmp_path)).eos_id == 5


@pytest.mark.parametrize(("name", "begins"), [("qwen", "5e28a2988304f625"), ("qwen-8192", "252b45f2b9e4c632")])
def test_fingerprints_stay_as_indexes_and_checkpoints_hold_them(name, begins):
    assert load_tokenizer(name).fingerprint.startswith(begins)
