"""Documents parsed by MinerU and docling make the records that our own extraction of PDFs makes."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.data import parsed
from moexpand.data.build import _digest
from moexpand.data.document import DocumentLimits
from moexpand.data.sources import list_sources
from tests.data.parsed_maker import BLOCKS, EXAMPLE, LONG, docling, mineru, picture, read
from tests.data.pdf_reading import of_kind, texts_of
from tests.data.test_build import build, digests


def test_a_content_list_of_mineru_makes_text_figures_tables_and_equations(tmp_path):
    records, counts = read(mineru(tmp_path / "paper"), tmp_path / "out")
    assert texts_of(records) == [
        "An example",
        f"{LONG}It is drawn in Fig. 1.",
        "- one point\n- another",
        f"{LONG}Table 2 and Eq. (3) say more.",
        "$$\ny = x \\tag{3}\n$$",
        "Listing 1\nprint(1)",
    ]
    figure, chart = of_kind(records, "figure")
    assert figure == {
        "kind": "figure",
        "text": f"Figure 1: A zigzag in blue.\n\n(a) Drawn by hand.\n\n{LONG}It is drawn in Fig. 1.",
        "caption": "Figure 1: A zigzag in blue.",
        "number": "1",
        "page": 1,
        "box": [120.0, 240.0, 360.0, 400.0],
        "mentions": [f"{LONG}It is drawn in Fig. 1."],
        "inner_text": "",
        "image": "figure-0001-00001.jpg",
    }
    assert (tmp_path / "out" / figure["image"]).read_bytes() == (tmp_path / "paper/images/a.jpg").read_bytes()
    assert (chart["number"], chart["page"], chart["box"], chart["inner_text"]) == ("2", 2, None, "| a | 7 |")
    (table,) = of_kind(records, "table")
    assert table["inner_text"] == "both\nx < 1 | 0.5"
    assert table["html"].startswith("<table>")
    assert table["mentions"] == [f"{LONG}Table 2 and Eq. (3) say more."]
    (equation,) = of_kind(records, "equation")
    assert (equation["number"], equation["caption"], equation["inner_text"]) == ("3", "", "$$\ny = x \\tag{3}\n$$")
    assert equation["text"] == "\n\n".join(texts_of(records)[3:6])
    assert counts["pages"] == {"input": 3, "kept": 3, "dropped": {}}
    assert counts["figures"] == {"input": 5, "kept": 4, "dropped": {"no_caption": 1}}


def test_small_figures_and_late_pages_are_dropped(tmp_path):
    sizes = {"image": [0, 0, 59, 500], "table": [0, 0, 500, 22], "chart": [0, 0, 61, 46]}
    blocks = [
        {"type": kind, "img_path": "images/a.jpg", f"{kind}_caption": ["Figure 1: A."], "bbox": bbox, "page_idx": 0}
        for kind, bbox in sizes.items()
    ]
    blocks += [{**blocks[2], "img_path": "images/a.jpg"}, {"type": "text", "text": LONG, "page_idx": 5000}]
    records, counts = read(mineru(tmp_path / "paper", blocks), tmp_path / "out")
    assert counts["figures"] == {"input": 4, "kept": 2, "dropped": {"too_small": 2}}
    assert counts["pages"] == {"input": 4, "kept": 3, "dropped": {"beyond_page_limit": 1}}
    assert texts_of(records) == ["Figure 1: A."] * 2
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 1


def test_boxes_are_left_out_where_mineru_does_not_say_how_large_pages_are(tmp_path):
    records, counts = read(mineru(tmp_path / "paper", middle=False), tmp_path / "out", DocumentLimits())
    assert [record["box"] for record in records if record["kind"] != "text"] == [None] * 3
    assert counts["pages"]["input"] == 2


def test_names_of_fields_of_older_versions_of_mineru_are_known(tmp_path):
    blocks = [
        {"type": "text", "text": LONG, "page_idx": 0},
        {
            "type": "image",
            "img_path": "images/a.jpg",
            "img_caption": ["Figure 1: Old."],
            "img_footnote": ["Note."],
            "page_idx": 0,
        },
        {"type": "table", "img_path": "", "table_caption": ["Table 1: Latex."], "table_body": "a & b", "page_idx": 0},
    ]
    records, counts = read(mineru(tmp_path / "paper", blocks), tmp_path / "out")
    assert [record["text"] for record in of_kind(records, "figure")] == ["Figure 1: Old.\n\nNote."]
    assert counts["figures"]["dropped"] == {"no_picture": 1}
    assert texts_of(records) == [LONG.strip(), "Table 1: Latex.", "a & b"], (
        "what is dropped as a figure stays in the running text"
    )


def test_the_second_form_of_content_lists_says_the_same(tmp_path):
    def spans(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "content": text}]

    first = mineru(tmp_path / "first", [BLOCKS[i] for i in (0, 1, 2, 3, 5, 6, 7, 8, 9)])
    pages = [
        [
            {"type": "page_header", "content": {"page_header_content": spans("Running head")}, "bbox": [100, 20, 400, 30]},
            {"type": "title", "content": {"title_content": spans("An example"), "level": 1}, "bbox": [100, 50, 500, 70]},
            {"type": "paragraph", "content": {"paragraph_content": spans(f"{LONG}It is drawn in Fig. 1.")}},
            {
                "type": "image",
                "content": {
                    "image_source": {"path": "images/a.jpg"},
                    "content": "",
                    "image_caption": spans("Figure 1: A zigzag in blue."),
                    "image_footnote": spans("(a) Drawn by hand."),
                },
                "bbox": [200, 300, 600, 500],
            },
            {
                "type": "list",
                "content": {
                    "list_type": "text_list",
                    "list_items": [{"item_type": "text", "item_content": spans(text)} for text in ("- one point", "- another")],
                },
            },
        ],
        [
            {"type": "paragraph", "content": {"paragraph_content": spans(f"{LONG}Table 2 and Eq. (3) say more.")}},
            {
                "type": "table",
                "content": {
                    "image_source": {"path": "images/b.jpg"},
                    "table_caption": spans("Table 2. Values."),
                    "table_footnote": [],
                    "html": BLOCKS[7]["table_body"],
                },
                "bbox": [200, 300, 600, 500],
            },
            {
                "type": "equation_interline",
                "content": {"math_content": "y = x \\tag{3}", "math_type": "latex", "image_source": {"path": "images/c.jpg"}},
                "bbox": [200, 550, 600, 600],
            },
            {"type": "code", "content": {"code_caption": spans("Listing 1"), "code_content": spans("print(1)")}},
        ],
    ]
    second = mineru(tmp_path / "second")
    second.unlink()
    second = second.with_name("paper_content_list_v2.json")
    second.write_text(json.dumps(pages))
    assert read(first, tmp_path / "one") == read(second, tmp_path / "two")
    (found,) = list_sources(None, [str(tmp_path / "second")])
    assert (found.path, found.format) == (second, "mineru")


@pytest.mark.parametrize("name", ["referenced", "embedded"])
def test_a_document_of_docling_makes_text_figures_tables_and_equations(name, tmp_path):
    records, counts = read(EXAMPLE / f"{name}.json", tmp_path / "out")
    texts = texts_of(records)
    assert texts[0] == "An example document"
    assert texts[2] == "- The first point of a list.\n- The second point.\n1. A point below it."
    assert "Here words stand in several pieces." in texts
    assert not any("Running head" in text or "zigzag" in text or "in seconds" in text for text in texts)
    (figure,), (table,), (equation,) = (of_kind(records, kind) for kind in ("figure", "table", "equation"))
    assert (figure["caption"], figure["page"], figure["box"]) == ("Figure 1: A zigzag in blue.", 1, [100, 300, 220, 380])
    assert (figure["mentions"], figure["inner_text"]) == ([texts[1]], "time in seconds")
    assert Image.open(tmp_path / "out" / figure["image"]).size == (120, 80)
    assert (table["number"], table["box"]) == ("1", [100, 200, 400, 300])
    assert table["inner_text"] == "sample | value\nfirst | 0.48\nsecond | 0.52"
    shown = Image.open(tmp_path / "out" / table["image"])
    assert shown.size == (150, 50)
    assert shown.getpixel((0, 0)) == (0, 0, 0) != shown.getpixel((75, 25))
    assert (equation["number"], equation["box"]) == ("1", [100, 400, 400, 440])
    assert equation["text"].endswith("Here the example ends.")
    assert "\n\n$$m = " in equation["text"]
    assert counts["pages"] == {"input": 3, "kept": 3, "dropped": {}}
    assert counts["figures"] == {"input": 4, "kept": 3, "dropped": {"no_caption": 1}}


def test_figures_without_pictures_are_dropped_and_their_text_stays(tmp_path):
    def strip(content: dict[str, Any]) -> None:
        for item in (*content["pictures"], *content["pages"].values()):
            item.pop("image", None)

    records, counts = read(docling(strip, tmp_path / "in"), tmp_path / "out")
    assert counts["figures"] == {"input": 4, "kept": 0, "dropped": {"no_caption": 1, "no_picture": 3}}
    assert {"Figure 1: A zigzag in blue.", "sample | value\nfirst | 0.48\nsecond | 0.52"} <= set(texts_of(records))


def output(folder: Path) -> Path:
    """Folder with output of both tools, broken documents among it."""
    mineru(folder / "paper" / "auto")
    mineru(folder / "broken", "{", name="broken")
    mineru(
        folder / "hostile", [{"type": "image", "img_path": "../../x", "image_caption": ["Figure 1: A"], "page_idx": 0}], name="h"
    )
    shutil.copytree(EXAMPLE, folder / "docling", ignore=shutil.ignore_patterns("make.py"))
    (folder / "docling" / "referenced.md").write_text(LONG * 9)
    (folder / "docling" / "other.json").write_text('{"neither": 1}')
    (folder / "docling" / "cut.json").write_text('{"schema_name": "DoclingDocument", ')
    with open(folder / "docling" / "huge.json", "wb") as file:
        file.write(b'{"schema_name": "DoclingDocument"')
        file.truncate(parsed.MAX_JSON_BYTES + 1)
    return folder


def test_a_build_reads_output_of_both_tools_and_its_counts_add_up(tmp_path):
    source = output(tmp_path / "parsed")
    for name, workers in (("one", 1), ("two", 2)):
        summary = build(tmp_path / name, None, [source], workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    stages = summary["stages"]
    assert stages["documents"] == {"input": 7, "kept": 4, "dropped": {"not_json": 2, "too_large": 1}}
    assert stages["figures"]["dropped"] == {"image_outside": 1, "no_caption": 3}
    for stage in stages.values():
        assert stage["input"] == stage["kept"] + sum(stage["dropped"].values())
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    metas = {name: json.loads(content) for name, content in members.items() if name.endswith(".json")}
    figures = {meta["source"]: name for name, meta in metas.items() if meta["kind"] == "figure" and meta["number"] == "1"}
    assert set(figures) == {"parsed/paper/auto/paper_content_list.json", "parsed/docling/embedded.json"}
    mine = figures["parsed/paper/auto/paper_content_list.json"]
    assert metas[mine]["box"] == [120.0, 240.0, 360.0, 400.0]
    assert members[mine.replace(".json", ".jpg")] == picture()
    assert members[mine.replace(".json", ".txt")].decode().startswith("Figure 1: A zigzag in blue.\n\n(a) Drawn by hand.\n\n")


def test_what_came_along_is_no_source_of_its_own(tmp_path):
    found = list_sources(None, [str(output(tmp_path / "parsed"))])
    assert [(file.name.removeprefix("parsed/"), file.format) for file in found] == [
        ("broken/broken_content_list.json", "mineru"),
        ("docling/cut.json", "docling"),
        ("docling/embedded.json", "docling"),
        ("docling/huge.json", "docling"),
        ("docling/referenced.json", "docling"),
        ("hostile/h_content_list.json", "mineru"),
        ("paper/auto/paper_content_list.json", "mineru"),
    ]


def test_a_folder_of_pdfs_gives_the_papers_and_not_the_copies_with_boxes_drawn_on_them(tmp_path):
    folder = mineru(tmp_path / "paper").parent
    for end in ("layout", "span", "spans", "origin"):
        (folder / f"paper_{end}.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "floor_layout.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "structured_content.json").write_text('{"pages": []}')
    found = list_sources(str(tmp_path), [])
    assert sorted(file.path.name for file in found) == ["floor_layout.pdf", "paper_origin.pdf"]
    assert {file.format for file in found} == {"pdf"}


def test_other_json_is_refused_by_name_and_passed_over_in_folders(tmp_path):
    assert list_sources(None, [str(EXAMPLE / "embedded.json")])[0].format == "docling"
    assert list_sources(None, [str(mineru(tmp_path / "paper"))])[0].format == "mineru"
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    with pytest.raises(InputError, match=r"rows\.json is neither a content list of MinerU .* nor a DoclingDocument of docling"):
        list_sources(None, [str(tmp_path / "rows.json")])
    newest = tmp_path / "newest"
    newest.mkdir()
    (newest / "markdown.md").write_text(LONG)
    (newest / "structured_content.json").write_text('{"pages": []}')
    with pytest.raises(InputError, match="output of MinerU 4 in a form that is not read"):
        list_sources(None, [str(newest)])


def test_a_picture_that_changed_is_read_anew_where_a_build_goes_on(tmp_path):
    path = mineru(tmp_path / "paper")
    (file,) = list_sources(None, [str(path)])
    before = _digest(file)
    assert _digest(file) == before
    (path.parent / "images" / "a.jpg").write_bytes(picture(side=99))
    assert _digest(file) != before
    os.symlink("/dev/zero", path.parent / "images" / "zero.jpg")
    assert _digest(file)
