"""Broken and hostile output of MinerU and docling ends under a reason, and nothing outside its folder is read."""

import base64
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from moexpand.data import parsed
from tests.data.parsed_maker import EXAMPLE, LONG, docling, mineru, picture, read
from tests.data.pdf_reading import texts_of


def test_circles_and_depth_in_doclings_tree_end(tmp_path):
    def tangle(content: dict[str, Any]) -> None:
        groups = len(content["groups"])
        chain = [
            {"self_ref": f"#/groups/{i}", "children": [{"$ref": f"#/groups/{i + 1}"}], "label": "list", "name": "g"}
            for i in range(groups, groups + 5000)
        ]
        chain[-1]["children"] = [{"$ref": f"#/groups/{groups}"}, {"$ref": "#/texts/1"}]
        content["groups"] += chain
        content["body"]["children"] += [{"$ref": f"#/groups/{groups}"}, {"$ref": "#/texts/1"}]
        content["texts"][2]["children"] = [{"$ref": "#/texts/2"}]
        content["pictures"][0]["children"] += [{"$ref": "#/pictures/0"}, {"$ref": f"#/groups/{groups + 7}"}]

    plain, _ = read(EXAMPLE / "referenced.json", tmp_path / "plain")
    records, counts = read(docling(tangle, tmp_path / "in"), tmp_path / "out")
    assert counts["reason"] is None
    assert sorted(texts_of(records)) == sorted(texts_of(plain))


BROKEN = {
    "not_json": ["{not json", "[" * 100_000, '{"schema_name": "DoclingDocument", "a": ' + "9" * 10_000 + "}", "\xff\xfe"],
    "wrong_structure": [
        "{}",
        "17",
        '[{"type": "text", "text": "a"}]',
        '[{"type": 3, "page_idx": 0}]',
        "[[1]]",
        '[{"type": "a", "page_idx": true}]',
    ],
    "no_text": ["[]", '[{"type": "text", "text": " \\u200b", "page_idx": 0}]', '[{"type": "image", "page_idx": 0}]'],
}


@pytest.mark.parametrize(("reason", "content"), [(reason, content) for reason in BROKEN for content in BROKEN[reason]])
def test_broken_content_lists_end_under_a_reason(reason, content, tmp_path):
    records, counts = read(mineru(tmp_path / "paper", content), tmp_path / "out")
    assert (records, counts["reason"]) == ([], reason)
    assert counts["pages"]["input"] == counts["figures"]["input"] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda content: [content],
        lambda content: content.update(schema_name="Other"),
        lambda content: content.pop("body") and None,
        lambda content: content.update(texts={"0": {}}),
        lambda content: content.update(texts=["a"]),
        lambda content: content.update(pages=[1]),
        lambda content: content["body"].update(children=[{"$ref": "#/texts/99999"}]),
        lambda content: content["body"].update(children=[{"$ref": "#/texts/-1"}]),
        lambda content: content["body"].update(children=[{"$ref": "#/origin/0"}]),
        lambda content: content["body"].update(children=7),
        lambda content: content["tables"][0]["captions"].append("#/texts/0"),
        lambda content: content["tables"][0]["data"]["table_cells"].append({"text": "a"}),
    ],
)
def test_documents_of_docling_that_are_built_wrongly_end_under_a_reason(change, tmp_path):
    records, counts = read(docling(change, tmp_path / "in"), tmp_path / "out")
    assert (records, counts["reason"]) == ([], "wrong_structure")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parsed, "MAX_JSON_BYTES", 1000)
    assert read(EXAMPLE / "embedded.json", tmp_path / "out")[1]["reason"] == "too_large"


def test_pictures_outside_of_the_folder_are_never_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture("PNG"))
    folder = tmp_path / "paper"
    names = {
        "../secret.png": "image_outside",
        "images/../../secret.png": "image_outside",
        str(secret): "image_outside",
        f"file://{secret}": "image_outside",
        "https://example.org/a.png": "image_outside",
        "images/link.png": "image_missing",
        "linked/secret.png": "image_missing",
        "images/loop.png": "image_missing",
        "images/" + "n" * 5000: "image_missing",
        "images/a\x00.jpg": "image_missing",
        "images/": "no_picture",
        "images/text.png": "image_unknown_format",
        "images/cut.png": "image_broken",
        "data:image/png;base64,!!!": "image_broken",
        "data:image/png;base64," + base64.b64encode(b"GIF89a").decode(): "image_unknown_format",
    }
    blocks = [{"type": "text", "text": LONG, "page_idx": 0}]
    blocks += [
        {"type": "image", "img_path": name, "image_caption": [f"Figure {i}: A."], "page_idx": 0} for i, name in enumerate(names)
    ]
    path = mineru(folder, blocks)
    (folder / "images" / "link.png").symlink_to(secret)
    (folder / "images" / "loop.png").symlink_to("loop.png")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "images" / "text.png").write_text("no picture")
    (folder / "images" / "cut.png").write_bytes(picture("PNG")[:20])
    records, counts = read(path, tmp_path / "out")
    wanted: dict[str, int] = {}
    for reason in names.values():
        wanted[reason] = wanted.get(reason, 0) + 1
    assert counts["figures"] == {"input": len(names), "kept": 0, "dropped": dict(sorted(wanted.items()))}
    assert len(texts_of(records)) == 1 + len(names)


def test_absolute_paths_of_docling_are_looked_for_among_its_own_pictures_alone(tmp_path):
    def move(content: dict[str, Any]) -> None:
        image = content["pictures"][0]["image"]
        image["uri"] = "/somewhere/else/" + image["uri"]
        content["pages"]["2"]["image"]["uri"] = "/etc/hostname"

    _, counts = read(docling(move, tmp_path / "in"), tmp_path / "out")
    assert counts["figures"] == {"input": 4, "kept": 2, "dropped": {"image_missing": 1, "no_caption": 1}}


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    "",
    "\x00",
    "\ud800",
    "#/texts/0",
    "../x",
    [],
    {},
    [[]],
    [None],
    {"$ref": "#/body"},
]


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or place) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


@pytest.mark.parametrize("tool", ["mineru", "docling"])
def test_whatever_stands_in_a_field_no_reader_fails(tool, tmp_path):
    random = Random(tool)
    source = mineru(tmp_path / "in") if tool == "mineru" else docling(lambda content: None, tmp_path / "in")
    original = source.read_text()
    reasons = set()
    for number in range(250):
        content = json.loads(original)
        for container, key in random.sample(list(spots(content)), 1 + number % 3):
            container[key] = random.choice(ODD)
        source.write_text(json.dumps(content))
        records, counts = read(source, tmp_path / f"out-{number}")
        reasons.add(counts["reason"])
        assert bool(records) == (counts["reason"] is None)
    assert reasons <= {None, "wrong_structure"}
    assert len(reasons) == 2
