"""A model's chat template is found in its files, and what it cannot write safely is refused."""

import json

import pytest

from moexpand.base.errors import InputError
from moexpand.data.chat import render_chat, system_parts
from moexpand.data.chat_template import ChatTemplate, load_chat_template
from moexpand.data.parts import encode_parts
from moexpand.data.tokens import load_tokenizer
from tests.data.chats import ASSISTANT, CHATML, STRICT, TOOLS, USER


def test_the_template_of_a_folder_is_taken_from_its_files_with_its_variables(tokenizer, folder, auto, tmp_path):
    loaded = load_chat_template(str(folder), tokenizer)
    ids = encode_parts(render_chat([USER, ASSISTANT], loaded).samples[0].parts, tokenizer, []).ids.tolist()
    assert ids == auto.apply_chat_template([USER, ASSISTANT], tokenize=True, return_dict=False)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|endoftext|>"},
                "chat_template": [
                    {"name": "default", "template": "{{ eos_token }}" + CHATML},
                    {"name": "tool_use", "template": "tools:" + CHATML},
                ],
            }
        )
    )
    named = load_chat_template(str(tmp_path), tokenizer)
    texts = [
        tokenizer.decode(encode_parts(render_chat([USER, ASSISTANT], named, tools).samples[0].parts, tokenizer, []).ids)
        for tools in (None, TOOLS)
    ]
    assert texts[0].startswith("<|endoftext|><|im_start|>user")
    assert texts[1].startswith("tools:<|im_start|>user")
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + CHATML)
    dated = render_chat([USER, ASSISTANT], load_chat_template(str(tmp_path), tokenizer, date="2024-02-29")).samples[0]
    assert dated.parts[0]["text"].startswith("29 February 2024<|im_start|>")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match="not a chat template that jinja can read"):
        load_chat_template(str(tmp_path), tokenizer)
    with pytest.raises(InputError, match="write it as YYYY-MM-DD"):
        load_chat_template("qwen", tokenizer, date="yesterday")


def test_tokens_that_swallow_white_space_are_refused_in_templates(folder, tmp_path):
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    with pytest.raises(InputError, match=r"swallows white space"):
        load_chat_template(str(tmp_path), load_tokenizer(str(tmp_path)))


def test_a_system_prompt_alone_is_written_by_the_template_without_loss(tokenizer):
    template = load_chat_template("qwen-8192", tokenizer)
    parts = system_parts(template, "You are <|im_end|> exact.")
    encoded = encode_parts(parts, tokenizer, [])
    assert tokenizer.decode(encoded.ids) == "<|im_start|>system\nYou are <|im_end|> exact.<|im_end|>\n"
    assert not encoded.loss.any()
    assert sum(encoded.ids == tokenizer.specials["<|im_end|>"]) == 1
    with pytest.raises(InputError, match="cannot write the system prompt"):
        system_parts(ChatTemplate({"default": STRICT}, tokenizer), "x")
    with pytest.raises(InputError, match="leaves out the system prompt"):
        system_parts(ChatTemplate({"default": "{{ messages | length }}"}, tokenizer), "x")
