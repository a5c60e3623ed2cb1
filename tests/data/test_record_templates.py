"""Rows become text by templates that run nothing, and a domain's samples begin with a system prompt of its own."""

import csv
import io
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.chat_template import load_chat_template
from moexpand.data.parts import Unusable, check_parts, encode_parts
from moexpand.data.record_templates import RecordTemplates, read_rows
from moexpand.data.tally import Tally

FILE = """
domains:
  chemistry: {system: "You are a chemist."}
  general: {system: "You are helpful."}
templates:
  solubility:
    domain: chemistry
    text:
      - "{name} ({Mol. weight}) dissolves: {log s}."
      - "log S of {name} is {log s}; {{as measured}}."
  note: "{name}!"
"""
CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@pytest.fixture(scope="module")
def templates(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("templates") / "templates.yaml"
    path.write_text(FILE)
    return RecordTemplates(path, load_chat_template("qwen-8192", tokenizer))


def test_a_domains_samples_begin_with_its_system_prompt_and_train_on_the_text_alone(templates, tokenizer):
    row = {"name": "water<|im_end|>", "log s": -1.5, "Mol. weight": 18}
    sample = templates.fill(row, "row-1", 0, "solubility")
    check_parts(sample.parts)
    encoded = encode_parts(sample.parts, tokenizer, [])
    opening = "<|im_start|>system\nYou are a chemist.<|im_end|>\n"
    assert tokenizer.decode(encoded.ids) == opening + sample.text
    assert tokenizer.decode(encoded.ids[encoded.loss]) == sample.text
    assert sum(encoded.ids == tokenizer.specials["<|im_end|>"]) == 1
    texts = ["water<|im_end|> (18) dissolves: -1.5.", "log S of water<|im_end|> is -1.5; {as measured}."]
    assert sample.text == texts[sample.variant]
    assert (sample.template, sample.domain) == ("solubility", "chemistry")
    plain = templates.fill(row, "row-1", 0, "note")
    assert plain.parts == [{"text": "water<|im_end|>!"}]
    assert plain.domain is None


def test_the_text_is_picked_by_seed_and_key_alone_and_each_is_picked(templates):
    row = {"name": "n", "log s": 1, "Mol. weight": 2}
    picked = [templates.fill(row, f"row-{i}", 7, "solubility").variant for i in range(400)]
    assert picked == [templates.fill(dict(reversed(row.items())), f"row-{i}", 7, "solubility").variant for i in range(400)]
    assert 150 < Counter(picked)[0] < 250
    assert picked != [templates.fill(row, f"row-{i}", 8, "solubility").variant for i in range(400)]
    # Fixed once and for all: shards made today are made again tomorrow.
    assert picked[:12] == [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1]


def test_a_row_gets_a_text_that_it_can_fill_or_a_reason(templates):
    for number in range(20):
        assert templates.fill({"name": "n", "log s": 0}, str(number), 0, "solubility").text == "log S of n is 0; {as measured}."
    for row in ({"name": "n"}, {"name": "n", "log s": "  "}, {"name": "n", "log s": None}, {}):
        with pytest.raises(Unusable, match="missing_field: the row has nothing under") as caught:
            templates.fill(row, "k", 0, "solubility")
        assert caught.value.reason == "missing_field"
    with pytest.raises(InputError, match="no record template 'other'; there are solubility, note"):
        templates.fill({}, "k", 0, "other")
    with pytest.raises(InputError, match="no record template None"):
        templates.fill({}, "k", 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(CELL, CELL), max_size=5))
def test_braces_and_formats_in_texts_and_values_are_only_characters(pairs):
    """Literal texts come back as written; values are never read for placeholders."""
    row = {f"c{i}": f"{{name}} {{0.__class__}} {value}" for i, (_, value) in enumerate(pairs)} | {"x": "!r:>10"}
    source = "".join(text.replace("{", "{{").replace("}", "}}") + f"{{c{i}}}" for i, (text, _) in enumerate(pairs)) + "{x}"
    expected = "".join(text + row[f"c{i}"] for i, (text, _) in enumerate(pairs)) + "!r:>10"
    assert RecordTemplates({"templates": {"t": source}}).fill(row, "k", 0).text == expected


def test_a_placeholder_reaches_no_attribute_and_no_format():
    templates = RecordTemplates({"templates": {"t": ["{x.__class__}", "{x!r}", "{x:>1000000000}", "{x[0]}"]}})
    with pytest.raises(Unusable, match="missing_field"):
        templates.fill({"x": "secret"}, "k", 0)
    assert templates.fill({"x": "secret", "x!r": "a column of this name"}, "k", 0).text == "a column of this name"


def test_values_that_are_no_text_stand_as_json():
    fill = RecordTemplates({"templates": {"t": "{v}"}}).fill
    for value in (1.1, -0.0, True, [1, "ä"], {"a": None}, 10**30):
        text = fill({"v": value}, "k", 0).text
        assert json.loads(text) == value
        assert "\\u" not in text
    assert fill({"v": "a\ud800b"}, "k", 0).text == "a?b"


@pytest.mark.parametrize("other", ["You are a chemist.", "  you are\n a CHEMIST. ", "Ｙou are a chemist."])
def test_two_domains_with_one_system_prompt_are_refused(other):
    domains = {"chemistry": {"system": "You are a chemist."}, "general": {"system": other}}
    with pytest.raises(InputError, match=r"'chemistry' and 'general' .* share one system prompt"):
        RecordTemplates({"domains": domains, "templates": {"t": "{x}"}})


def test_the_owner_of_a_system_prompt_is_known(templates):
    assert templates.owner(" You are a  Chemist.") == "chemistry"
    assert templates.owner("You are helpful.") == "general"
    assert templates.owner("You are a chemist") is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "no template in"),
        ([], "there must be 'templates'"),
        ({"template": {}}, "there must be 'templates'"),
        ({"templates": {"t": "a } b"}}, "a brace stands alone"),
        ({"templates": {"t": "a {} b"}}, "a brace stands alone"),
        ({"templates": {"t": "a {x{y}} b"}}, "a brace stands alone"),
        ({"templates": {"t": []}}, "a list of texts, none of them empty"),
        ({"templates": {"t": {"text": "x", "system": "y"}}}, "have the keys text and domain"),
        ({"templates": {"t": {"text": "x", "domain": "physics"}}}, "has the domain 'physics'"),
        ({"domains": {"d": "You"}, "templates": {"t": "x"}}, "must have one key, system"),
        ({"domains": {"d": {"system": "You"}}, "templates": {"t": {"text": "x", "domain": "d"}}}, "no chat template"),
    ],
)
def test_a_wrong_template_file_is_refused_by_name(content, says, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        RecordTemplates(path)
    if isinstance(content, dict):
        with pytest.raises(InputError, match=says):
            RecordTemplates(content)


def test_unreadable_template_files_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        RecordTemplates(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="neither YAML nor JSON"):
        RecordTemplates(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("templates: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="neither YAML nor JSON"):
        RecordTemplates(tmp_path / "code.yaml")


def rows_of(path):
    tally = Tally()
    rows = list(read_rows(path, tally))
    assert tally.kept == len(rows)
    assert tally.input == tally.kept + sum(tally.dropped.values())
    return rows, dict(tally.dropped)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(CELL | st.sampled_from(['"', ",", "\t", "a\nb", "\r\n"]), min_size=3, max_size=3), max_size=6))
def test_rows_written_by_the_csv_module_come_back(tmp_path_factory, cells):
    for ending, delimiter in ((".csv", ","), (".tsv", "\t"), (".TAB", "\t")):
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter=delimiter)
        writer.writerows([["a", "b c", "é"], *cells])
        path = tmp_path_factory.getbasetemp() / f"rows{ending}"
        path.write_bytes("\ufeff".encode() + buffer.getvalue().encode())
        rows, dropped = rows_of(path)
        assert [list(row.values()) for _, row in rows] == cells
        assert all(list(row) == ["a", "b c", "é"] for _, row in rows)
        assert dropped == {}


def test_bad_rows_of_csv_are_counted_and_the_others_keep_their_places(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n1\n1,2,3\n\n\xff,1\n"x"y,1\n"l\nm",5\n7,8')
    rows, dropped = rows_of(path)
    assert rows == [("line 2", {"a": "1", "b": "2"}), ("line 8", {"a": "l\nm", "b": "5"}), ("line 10", {"a": "7", "b": "8"})]
    assert dropped == {"wrong_columns": 2, "not_utf8": 1, "not_csv": 1}


def test_bad_lines_of_jsonl_are_counted_and_the_others_keep_their_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"",
        b"{",
        b"[1]",
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        deep,
        b"9" * 5000,
        b'{"b": "\\ud800"}\r',
    ]
    path.write_bytes(b"\n".join(lines) + b'\n{"a": 2}')
    rows, dropped = rows_of(path)
    assert rows == [("line 1", {"a": 1}), ("line 9", {"b": "\ud800"}), ("line 10", {"a": 2})]
    assert dropped == {"not_json": 4, "not_object": 1, "not_utf8": 1}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.xlsx", b"", "have the ending '.xlsx'"),
        ("rows.csv", b"a,a\n1,2\n", "each once"),
        ("rows.csv", b"a,\n1,2\n", "name every column"),
        ("rows.csv", b"\xe9,b\n1,2\n", "is not UTF-8"),
        ("rows.csv", b'"a"b,c\n1,2\n', "is not CSV"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_files_that_are_no_records_are_input_errors(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(read_rows(tmp_path / name, Tally()))
