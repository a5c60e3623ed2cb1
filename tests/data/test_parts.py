"""Parts become the ids that a Hugging Face tokenizer gives the whole text, and only markup gives special tokens."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.parts import check_parts, encode_parts, encode_text, text_part
from moexpand.data.tokens import QWEN_SPECIALS, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
WITH_SPECIALS = st.lists(TEXT | st.sampled_from([*QWEN_SPECIALS, "<|im_", "start|>", "\n", "  "])).map("".join)


@settings(max_examples=100, deadline=None)
@given(WITH_SPECIALS, st.booleans())
def test_plain_text_never_gives_a_special_id_and_comes_back(tokenizer, text, loss):
    sample = encode_parts([text_part(text, loss)], tokenizer, [])
    assert sample.ids.dtype == np.int32
    assert not np.isin(sample.ids, list(tokenizer.specials.values())).any()
    assert tokenizer.decode(sample.ids) == unicodedata.normalize("NFC", text)
    assert (sample.loss == loss).all()


@settings(max_examples=100, deadline=None)
@given(WITH_SPECIALS)
@example("<|im_start|>user\n\n hi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>")
def test_markup_gives_the_ids_of_transformers(tokenizer, auto, text):
    expected = auto.encode(text, add_special_tokens=False)
    if "<|image_pad|>" in text:
        with pytest.raises(InputError, match="write an image part instead"):
            encode_parts([text_part(text, special=True)], tokenizer, [])
    else:
        assert encode_parts([text_part(text, special=True)], tokenizer, []).ids.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6))
def test_neighbouring_texts_of_one_loss_are_read_as_one_text_and_ids_split_where_the_loss_turns(tokenizer, pieces):
    sample = encode_parts([text_part(text, loss) for text, loss in pieces], tokenizer, [])
    runs: list[list] = []
    for text, loss in pieces:
        if text and runs and runs[-1][1] == loss:
            runs[-1][0] += text
        elif text:
            runs.append([text, loss])
    assert sample.ids.tolist() == [number for text, _ in runs for number in tokenizer.encode(text)]
    assert sample.loss.tolist() == [loss for text, loss in runs for _ in tokenizer.encode(text)]


def test_a_part_cut_out_of_a_text_gives_the_same_ids_in_markup_and_beside_it(tokenizer, auto):
    whole = "<|im_start|>user\n\n\nhello<|im_end|>\n\n"
    parts = [
        text_part("<|im_start|>", special=True),
        text_part("user\n"),
        text_part("\n\nhello"),
        text_part("<|im_end|>\n", special=True),
        text_part("\n"),
    ]
    assert encode_parts(parts, tokenizer, []).ids.tolist() == auto.encode(whole)


def test_an_image_is_its_placeholders_between_the_tokens_that_open_and_close_it():
    tokenizer = load_tokenizer("qwen")
    parts = [{"image": "0.png"}, text_part("between"), {"image": "1.jpg"}, text_part(" after")]
    sample = encode_parts(parts, tokenizer, [3, 1])
    between, after = tokenizer.encode("between"), tokenizer.encode(" after")
    image = [151652, 151655, 151655, 151655, 151653]
    assert sample.ids.tolist() == [*image, *between, 151652, 151655, 151653, *after]
    assert sample.loss.tolist() == [*[False] * 5, *[True] * len(between), *[False] * 3, *[True] * len(after)]
    assert sample.image_spans.tolist() == [[1, 4], [6 + len(between), 7 + len(between)]]
    for (start, stop), count in zip(sample.image_spans, [3, 1], strict=True):
        assert stop - start == count
        assert (sample.ids[start:stop] == 151655).all()
    assert (sample.ids == 151655).sum() == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(text_part, TEXT, st.booleans(), st.booleans()) | st.just({"image": "png"}), min_size=1, max_size=6))
def test_the_text_of_a_sample_is_its_ids_without_those_of_images(tokenizer, parts):
    whole = encode_parts(parts, tokenizer, [2] * sum("image" in part for part in parts))
    kept = np.ones(len(whole.ids), dtype=bool)
    for start, stop in whole.image_spans:
        kept[start - 1 : stop + 1] = False
    text = encode_text(parts, tokenizer)
    assert text.ids.tolist() == whole.ids[kept].tolist()
    assert text.loss.tolist() == whole.loss[kept].tolist()
    assert len(text.image_spans) == 0


def test_a_folders_tokenizer_gives_the_same_sample(tokenizer, folder):
    parts = [text_part("<|im_start|>a ", loss=False, special=True), {"image": "png"}, text_part(" b <|im_end|>")]
    ours, theirs = encode_parts(parts, tokenizer, [2]), encode_parts(parts, load_tokenizer(str(folder)), [2])
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.loss.tolist() == theirs.loss.tolist()


def test_intern_names_of_vision_tokens_are_known(tokenizer):
    renamed = {"<|vision_start|>": "<img>", "<|image_pad|>": "<IMG_CONTEXT>", "<|vision_end|>": "</img>"}

    specials = {renamed.get(token, token): number for token, number in tokenizer.specials.items()}
    intern = SimpleNamespace(name="intern", encode=tokenizer.encode, specials=specials)
    parts = [{"image": "png"}, text_part("x")]
    assert encode_parts(parts, intern, [5]).ids.tolist() == encode_parts(parts, tokenizer, [5]).ids.tolist()
    intern.specials = {"<|im_end|>": 1}
    with pytest.raises(InputError, match="has no tokens for images"):
        encode_parts(parts, intern, [5])


def test_numbers_of_vision_tokens_that_do_not_fit_the_images_are_refused(tokenizer):
    for counts in ([], [1, 2], [0]):
        with pytest.raises(InputError, match="has 1 image parts, but its images have"):
            encode_parts([{"image": "png"}, text_part("x")], tokenizer, counts)
    with pytest.raises(InputError, match="has 0 image parts"):
        encode_parts([text_part("x")], tokenizer, [1])


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "at least one part"),
        ({"text": "x"}, "at least one part"),
        (["x"], "Part 0 of a sample, 'x', is not a JSON object"),
        ([{"text": "x"}, {}], "Part 1 .* must have either"),
        ([{"text": "x", "image": "png"}], "must have either"),
        ([{"text": 3}], "must have a string as 'text'"),
        ([{"text": "x", "loss": 0}], "true or false as 'loss'"),
        ([{"text": "x", "mask": True}], "has the key 'mask'"),
        ([{"image": "png", "loss": True}], "has the key 'loss'"),
        ([{"image": "../../etc/x.png"}], "by the ending of its member"),
        ([{"image": "parts.json"}], "by the ending of its member"),
    ],
)
def test_what_is_no_part_is_refused_by_number_and_reason(parts, says):
    with pytest.raises(InputError, match=says):
        check_parts(parts)


def test_every_form_of_a_part_is_accepted():
    check_parts([{"text": ""}, {"text": "x", "loss": False, "special": True}, {"image": "png"}, {"image": "12.jpeg"}])
