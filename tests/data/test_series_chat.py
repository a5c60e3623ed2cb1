"""Time series in conversations become parts under every template, whether it knows of them or not."""

import numpy as np
import pytest

from moexpand.base.errors import InputError
from moexpand.data.chat import ChatSettings, chat_row, render_chat
from moexpand.data.chat_template import ChatTemplate
from moexpand.data.chatml import CHATML as BUILT_IN
from moexpand.data.parts import Unusable, encode_parts, series_ids
from moexpand.data.shards import cached_tokenizer
from tests.data.chats import CHATML, VISION
from tests.data.series_maker import TEMPLATE, build, heard, jsonl, noise, npy

MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "First "},
            {"type": "time_series", "time_series": "a.npy", "sampling_rate": 500},
            {"type": "text", "text": " then <TS_CONTEXT> "},
            {"type": "time_series", "time_series": "deep/b.NPY"},
        ],
    },
    {"role": "assistant", "content": "Two curves."},
]
AN_IMAGE = {"type": "image", "image": "c.png"}


def with_image() -> list[dict]:
    return [MESSAGES[0] | {"content": [AN_IMAGE, *MESSAGES[0]["content"]]}, MESSAGES[1]]


@pytest.mark.parametrize("source", [TEMPLATE, VISION, BUILT_IN, CHATML], ids=["its own", "images alone", "built-in", "strings"])
@pytest.mark.parametrize("pictured", [False, True])
def test_series_become_parts_under_every_template(tokenizer_folder, source, pictured):
    tokenizer = cached_tokenizer(str(tokenizer_folder))
    messages = with_image() if pictured else MESSAGES
    (sample,) = render_chat(messages, ChatTemplate({"default": source}, tokenizer)).samples
    assert sample.series == ("a.npy", "deep/b.NPY")
    assert sample.images == (("c.png",) if pictured else ())
    assert [part for part in sample.parts if "series" in part] == [{"series": "0.npy", "rate": 500.0}, {"series": "1.npy"}]
    encoded = encode_parts(sample.parts, tokenizer, [1] if pictured else [], [2, 1])
    image = ("Picture: " if source == VISION else "") + "<|vision_start|><|image_pad|><|vision_end|>" if pictured else ""
    thinking = "<think>\n\n</think>\n\n" if source == BUILT_IN else ""
    assert tokenizer.decode(encoded.ids) == (
        f"<|im_start|>user\n{image}First <|ts|><TS_CONTEXT><TS_CONTEXT><|/ts|> then <TS_CONTEXT> "
        f"<|ts|><TS_CONTEXT><|/ts|><|im_end|>\n<|im_start|>assistant\n{thinking}Two curves.<|im_end|>\n"
    )
    assert sum(encoded.ids == series_ids(tokenizer)[1]) == 3  # the user's own is ten characters
    assert not encoded.loss[np.isin(encoded.ids, series_ids(tokenizer))].any()


def test_a_tokenizer_without_the_tokens_still_gives_parts_under_the_built_in_template(tokenizer):
    (sample,) = render_chat(MESSAGES, ChatTemplate({"default": BUILT_IN}, tokenizer)).samples
    assert sum("series" in part for part in sample.parts) == 2


def asked(*items: dict) -> dict:
    return {"messages": [{"role": "user", "content": [*items, {"type": "text", "text": "?"}]}, MESSAGES[1]]}


def item(**fields: object) -> dict:
    return {"type": "time_series", **fields}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (asked(item()), "series_name", "a series of message 0 names no file"),
        (asked(item(time_series="a.csv")), "series_name", "a series of message 0 must be a file below the row's, ending in npy"),
        (asked(item(time_series="/a.npy")), "series_name", "a series of message 0 must be a file below"),
        (asked(item(time_series={"url": "https://x/a.npy"})), "series_remote", "a series of message 0 is an address"),
        (
            asked(item(time_series="a.npy", sampling_rate=-1)),
            "series_rate",
            "'a.npy' of message 0 has the sampling rate -1",
        ),
        (asked(item()) | {"series": ["a.npy", "b.npy"]}, "series_count", "the row names the series 'b.npy', and no message has"),
        (asked() | {"series": "a.npy"}, "series_count", "the row names the series 'a.npy', and no message"),
        (asked() | {"images": ["a.png"]}, "image_count", "the row names the image 'a.png', and no message"),
        (
            asked(item()) | {"series": ["a.npy"], "sampling_rate": [1, 2]},
            "series_rate",
            "sampling_rate has 2 numbers for 1 series",
        ),
        (asked() | {"images": 5}, "image_count", "the row names the image 5, and no message"),
        (asked({"type": "image"}), "image_name", "an image of message 0 names no file"),
    ],
)
def test_a_conversation_with_a_wrong_series_or_picture_has_a_reason(tokenizer_folder, row, reason, detail):
    template = ChatTemplate({"default": TEMPLATE}, cached_tokenizer(str(tokenizer_folder)))
    with pytest.raises(Unusable) as caught:
        chat_row(row, template, ChatSettings())
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_template_that_loses_a_series_is_refused(tokenizer_folder):
    tokenizer = cached_tokenizer(str(tokenizer_folder))
    first_alone = TEMPLATE.replace(
        "item.type == 'time_series' %}", "item.type == 'time_series' %}{%- if loop.index == 2 %}"
    ).replace("'<|ts|><TS_CONTEXT><|/ts|>' }}", "'<|ts|><TS_CONTEXT><|/ts|>' }}{%- endif %}")
    with pytest.raises(Unusable, match="the template writes 1 of 2 series") as caught:
        render_chat(MESSAGES, ChatTemplate({"default": first_alone}, tokenizer))
    assert caught.value.reason == "series_count"


def test_rows_supply_the_series_of_messages_that_name_none(tmp_path, tokenizer_folder):
    for number in range(2):
        (tmp_path / f"{number}.npy").write_bytes(npy(noise(number, 30 + number)))
    row = asked(item(), item()) | {"series": ["0.npy", "1.npy"], "sampling_rate": [10, None]}
    without = {"messages": [{"role": "user", "content": "No series?"}, MESSAGES[1]], "series": "Nature"}
    rows = [row, row | {"series": "0.npy", "sampling_rate": 1}, without]
    said: list[str] = []
    summary = build(jsonl(tmp_path / "chats.jsonl", *rows), tmp_path / "out", tokenizer_folder, said.append)
    assert summary["kinds"] == {"chat": 2}
    assert summary["stages"]["documents"]["dropped"] == {"series_name": 1}
    assert "the first left out is line 2: a series of message 0 names no file." in said[0]
    found = sorted((rates, [len(array) for array in series]) for _, rates, series in heard(tmp_path / "out"))
    assert found == [([], []), ([10.0, 31 / 4], [30, 31])]


def test_a_conversation_with_a_bad_picture_is_named_too(tmp_path, tokenizer_folder):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    row = asked({"type": "image", "image": "broken.png"})
    with pytest.raises(
        InputError, match=r"\(dropped: image_broken 1\).* The first left out is a\.jsonl: line 1: 'broken\.png': "
    ):
        build(jsonl(tmp_path / "a.jsonl", row), tmp_path / "out", tokenizer_folder)
