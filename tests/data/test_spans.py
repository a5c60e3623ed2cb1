"""Sequences between tags have vocabularies of their own, everything else is the base tokenizer's, and nothing is lost."""

import sys
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.parts import encode_parts, text_part
from moexpand.data.science_tokenizer import DOMAINS, SPECIALS
from moexpand.data.span_training import ALPHABETS
from moexpand.data.spans import TAGS, SpanTokenizer
from moexpand.data.tokens import Tokenizer, load_tokenizer
from tests.data.sequences import TAGGED, in_a_text

FULL = {"SMILES": range(151694, 152718), "PROT": range(152718, 153742), "XNA": range(153742, 154766)}


@pytest.fixture(scope="module")
def science() -> Tokenizer:
    return load_tokenizer("qwen-science")


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return load_tokenizer("qwen")


@pytest.mark.parametrize(("tag", "sequence"), [(tag, span) for tag, spans in TAGGED.items() for span in spans])
def test_a_tagged_sequence_is_its_tags_and_pieces_of_its_domain(science: SpanTokenizer, tag: str, sequence: str) -> None:
    text = f"<{tag}>{sequence}</{tag}>"
    first, *inside, last = science.encode(text)
    assert [science.decode([first]), science.decode([last])] == [f"<{tag}>", f"</{tag}>"]
    assert set(inside) <= set(FULL[TAGS[tag]])
    assert science.decode(inside) == sequence
    assert science.decode([first, *inside, last]) == text


def test_ids_are_those_of_intern_s1_pro(science: SpanTokenizer, qwen: Tokenizer) -> None:
    assert science.vocab_size == 155008
    assert {domain.name: domain.ids for domain in science.domains} == FULL
    assert {name: science.specials[name] for name in ("<|ts|>", "<|/ts|>", "<TS_CONTEXT>")} == {
        "<|ts|>": 151683, "<|/ts|>": 151684, "<TS_CONTEXT>": 151685,
    }  # fmt: skip
    assert len(SPECIALS) == 25
    assert science.encode("<SMILES>C</SMILES>")[0] == 151669
    assert science.eos_id == qwen.eos_id
    assert qwen.specials.items() <= science.specials.items()


def test_text_around_spans_is_the_base_tokenizer_s(science: SpanTokenizer, qwen: Tokenizer) -> None:
    text = "Aspirin is <SMILES>CC(=O)Oc1ccccc1C(=O)O</SMILES>, said  she."
    ids = science.encode(text)
    before, after = qwen.encode("Aspirin is "), qwen.encode(", said  she.")
    assert ids[: len(before)] == before
    assert ids[-len(after) :] == after
    assert all(151669 <= number < 152718 for number in ids[len(before) : -len(after)])


@pytest.mark.parametrize(
    "text",
    [
        "no tags at all",
        "C1CCCCC1 and MKWVTFISLLFLFSSAYS and GAGTTTTATCGC",
        "<SMILES>CCO",
        "CCO</SMILES>",
        "<SMILES>CCO</protein>",
        "<SMILES></SMILES>",
        "<smiles>CCO</smiles>",
        "<SMILES>ethyl alcohol</SMILES>",
        "<SMILES>CC\nO</SMILES>",
        "<dna>hello</dna>",
        "<rna>GGÇ</rna>",
        "<protein>mkwv</protein>",
        "<SMILES>CC\u2581O</SMILES>",
        "<SMILES>CC<|endoftext|>O</SMILES>",
        "<|ts|><TS_CONTEXT><|/ts|><|endoftext|><|reserved_0|>",
    ],
)
def test_what_is_no_whole_span_is_plain_text(science: SpanTokenizer, qwen: Tokenizer, text: str) -> None:
    assert science.encode(text) == qwen.encode(text)
    assert max(science.encode(text)) < 151643


def test_the_innermost_pair_of_tags_is_the_span(science: SpanTokenizer, qwen: Tokenizer) -> None:
    text = "<SMILES><dna><dna>ACGT</dna></SMILES>"
    ids = science.encode(text)
    span = science.encode("<dna>ACGT</dna>")
    assert ids == [*qwen.encode("<SMILES><dna>"), *span, *qwen.encode("</SMILES>")]


@pytest.mark.parametrize("domain", DOMAINS)
def test_pieces_write_every_character_of_their_alphabet(science: SpanTokenizer, domain: str) -> None:
    tag = next(tag for tag, name in TAGS.items() if name == domain)
    for character in ALPHABETS[domain]:
        assert science.encode(f"<{tag}>{character}</{tag}>")[1] in FULL[domain], character
    # Every piece but <unk> is real text of the alphabet.
    texts = [science.decode([number]) for number in FULL[domain]]
    assert texts[0] == f"<|{domain}_<unk>|>"
    assert set("".join(texts[1:])) == set(ALPHABETS[domain])
    assert len(set(texts)) == 1024


sequences = st.one_of([st.sampled_from(spans) for spans in TAGGED.values()])
alphabets = st.one_of([st.text(alphabet, max_size=40) for alphabet in ALPHABETS.values()])
tags = st.sampled_from([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")])
anything = st.text(st.characters(exclude_categories=["Cs"]))


def _span(tag: str, inside: str) -> str:
    return f"<{tag}>{inside}</{tag}>"


spans = st.builds(_span, st.sampled_from(list(TAGS)), st.one_of(sequences, alphabets, anything))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(anything, tags, sequences, alphabets, spans, st.just("\u0338"), st.just("\u2581"))))
def test_decode_undoes_encode_whatever_stands_between_whichever_tags(parts: list[str]) -> None:
    text = unicodedata.normalize("NFC", "".join(parts))
    small = once("qwen-8192-science")
    ids = small.encode("".join(parts))
    assert small.decode(ids) == text
    assert all(0 <= number < 11315 for number in ids)


def once(name: str, loaded: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    """The same object for every example."""
    if name not in loaded:
        loaded[name] = load_tokenizer(name)
    return loaded[name]


def test_fingerprints_tell_the_tokenizers_apart(science: SpanTokenizer, qwen: Tokenizer) -> None:
    names = ("qwen-8192", "qwen-8192-science")
    assert len({science.fingerprint, qwen.fingerprint, *(load_tokenizer(name).fingerprint for name in names)}) == 4


def test_neighbouring_texts_are_one_text_and_tags_are_no_markup(science: SpanTokenizer) -> None:
    parts = [text_part("It is <SMI"), text_part("LES>CCO</SMILES>"), text_part(" <protein>MK</protein>", special=True)]
    encoded = encode_parts(parts, science, [])
    assert encoded.ids.tolist() == science.encode("It is <SMILES>CCO</SMILES> <protein>MK</protein>")
    assert not any(token.strip("</>") in TAGS for token in science.specials)
    cut = encode_parts([text_part("<SMILES>CC", loss=False), text_part("O</SMILES>")], science, [])
    assert science.decode(cut.ids.tolist()) == "<SMILES>CCO</SMILES>"
    assert cut.ids.max() < 151643


def test_many_unclosed_tags_take_linear_time(science: SpanTokenizer) -> None:
    begin = time.perf_counter()
    science.encode("<dna>" * 200_000)
    science.encode("<dna>" + "ACGT" * 250_000 + "</dna>")
    assert time.perf_counter() - begin < 20


def test_without_sentencepiece_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"the package sentencepiece is not installed; run `pip install sentencepiece`\."):
        load_tokenizer("qwen-science")
    assert load_tokenizer("qwen-8192").encode("works") != []


def test_a_text_of_all_sequences_is_shorter_than_in_qwen(science: SpanTokenizer, qwen: Tokenizer) -> None:
    text = in_a_text()
    assert len(science.encode(text)) < 0.75 * len(qwen.encode(text))
