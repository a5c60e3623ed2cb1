"""Figures and tables of real documents are found as a person marked them; the scorer that says so can tell right from wrong."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from moexpand.data.sample_pdfs import SAMPLES, fetch_documents
from tests.data import score_figures
from tests.data.score_figures import Box, Document, Ink, Item, fetch_labelled, read_labels, score, score_document

BOX = (100.0, 100.0, 300.0, 250.0)
LABELS = [Item("figure", "1", 1, BOX), Item("table", "1", 1, (100.0, 400.0, 300.0, 440.0)), Item("figure", "2", 3, BOX)]


def as_drawn(page: int, box: Box) -> Box:
    """Every box is full of ink."""
    return box


def moved(item: Item, left: float, top: float, right: float, bottom: float) -> Item:
    x0, y0, x1, y1 = item.box
    return item._replace(box=(x0 + left, y0 + top, x1 + right, y1 + bottom))


def test_the_labels_themselves_are_all_right():
    result = score(LABELS, LABELS, as_drawn)
    assert (result.labels, result.predictions, result.strict, result.usable, result.faults) == (3, 3, 3, 3, [])
    assert result.strict_precision == result.strict_recall == 1.0


@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize(("off", "strict"), [(5.9, 1), (-5.9, 1), (6.1, 0), (-6.1, 0)])
def test_each_side_may_be_six_points_off(side, off, strict):
    shift = [off if i == side else 0.0 for i in range(4)]
    result = score([moved(LABELS[0], *shift)], LABELS[:1], as_drawn)
    assert (result.strict, result.usable) == (strict, 1)


def test_a_swallowed_caption_line_is_usable_and_half_a_figure_is_wrong():
    swallowed = score([moved(LABELS[0], 0, 0, 0, 12)], LABELS[:1], as_drawn)
    half = score([moved(LABELS[0], 0, 75, 0, 0)], LABELS[:1], as_drawn)
    assert (swallowed.strict, swallowed.usable) == (0, 1)
    assert (half.strict, half.usable) == (0, 0)


@pytest.mark.parametrize("other", [{"kind": "table"}, {"number": "2"}, {"page": 2}])
def test_kind_number_and_page_must_agree(other):
    result = score([LABELS[0]._replace(**other)], LABELS[:1], as_drawn)
    assert (result.predictions, result.usable, len(result.faults)) == (1, 0, 2)


def test_missed_and_repeated_ones_lower_recall_and_precision():
    result = score([LABELS[0], LABELS[0]], LABELS, as_drawn)
    assert (result.strict_precision, result.strict_recall) == (0.5, 1 / 3)
    assert sum("missed" in fault for fault in result.faults) == 2
    assert sum("found twice" in fault for fault in result.faults) == 1


def test_white_margins_do_not_count_and_a_line_of_ink_does(tmp_path):
    page = Image.new("1", (600, 800), "white")
    draw = ImageDraw.Draw(page)
    draw.rectangle((100, 100, 299, 249), fill="black")
    draw.text((100, 270), "Figure 1: a caption", fill="black")
    page.save(tmp_path / "page.pdf", resolution=72.0)
    trim = Ink(tmp_path / "page.pdf").trim
    assert trim(1, (0.0, 0.0, 600.0, 260.0)) == pytest.approx(BOX, abs=1.0)
    assert trim(1, (0.0, 0.0, 50.0, 800.0)) is None
    label = [Item("figure", "1", 1, BOX)]
    assert score([Item("figure", "1", 1, (20.0, 20.0, 580.0, 262.0))], label, trim).strict == 1
    assert score([Item("figure", "1", 1, (20.0, 20.0, 580.0, 300.0))], label, trim).strict == 0
    assert score([Item("figure", "1", 1, (400.0, 400.0, 500.0, 500.0))], label, trim).faults == [
        "figure 1 on page 1: wrong, no ink in the box"
    ]


def test_labels_are_many_well_formed_and_of_every_kind_in_both_halves():
    documents = read_labels()
    assert len({document.name for document in documents}) == len(documents) >= 13
    for document in documents:
        assert len({label[:3] for label in document.labels}) == len(document.labels) > 0
        for label in document.labels:
            x0, y0, x1, y1 = label.box
            assert label.kind in ("figure", "table")
            assert 1 <= label.page <= document.pages
            assert 0 <= x0 < x1
            assert 0 <= y0 < y1
        # The repository's own samples are looked at all the time.
        assert document.package is not None or document.split == "tuned"
    assert sum(len(document.labels) for document in documents) >= 170
    for split in ("tuned", "held_out"):
        half = read_labels(split)
        kinds = Counter(label.kind for document in half for label in document.labels)
        assert len(half) >= 6
        assert kinds["figure"] >= 60
        assert kinds["table"] >= 25
    assert {document.split for document in documents} == {"tuned", "held_out"}


def test_only_totals_are_told_of_documents_that_must_not_be_tuned_on(tmp_path, monkeypatch):
    def faulty(path: Path, document: Document) -> score_figures.Score:
        return score([moved(document.labels[0], 0, 0, 0, 50)], document.labels, as_drawn)

    monkeypatch.setattr(score_figures, "is_labelled", lambda path, document: True)
    monkeypatch.setattr(score_figures, "score_document", faulty)
    told = {split: [] for split in ("tuned", "held_out")}
    totals = {split: score_figures.score_split(tmp_path, split, lines.append) for split, lines in told.items()}
    assert len(told["held_out"]) == 2
    assert str(totals["held_out"].labels) in told["held_out"][1]
    assert any("figure 1 on page" in line for line in told["tuned"])


def test_documents_are_fetched_from_packages_and_from_the_repository(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "content.gz").write_bytes(gzip.compress(b"%PDF of a package"))
    (tools / "apt-get").write_text('#!/bin/sh\ncase "$*" in *some-doc*) : > some-doc_1_all.deb ;; *) exit 100 ;; esac\n')
    (tools / "dpkg").write_text(f'#!/bin/sh\nmkdir -p "$3/usr/doc" && cp {tools}/content.gz "$3/usr/doc/manual.pdf.gz"\n')
    for name in ("apt-get", "dpkg"):
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    sample = min(SAMPLES.glob("*.pdf"))
    wanted = [("some-doc", "usr/doc/manual.pdf.gz"), ("other-doc", "usr/doc/x.pdf"), (None, f"data/samples/{sample.name}")]
    lines: list[str] = []
    written = fetch_documents(tmp_path / "pdfs", wanted, lines.append)
    assert {path.name for path in written} == {"manual.pdf", sample.name}
    assert (tmp_path / "pdfs" / "manual.pdf").read_bytes() == b"%PDF of a package"
    assert lines == ["other-doc: usr/doc/x.pdf is not available"]


@pytest.fixture(scope="module")
def pdfs(tmp_path_factory):
    """The labelled documents of both halves."""
    folder = tmp_path_factory.mktemp("pdfs")
    absent = fetch_labelled(folder, read_labels(), print)
    assert not absent, f"not to be had as they were labelled: {absent}"
    return folder


@pytest.mark.extras
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("split", "least_precision", "least_recall"), [("tuned", 0.95, 0.92), ("held_out", 0.92, 0.90)])
def test_figures_and_tables_of_real_documents_are_found_as_labelled(pdfs, split, least_precision, least_recall):
    """The goal is 0.95 and 0.92 on both halves; the held-out half is short of it (docs/data.md), and may not become worse."""
    total = score_figures.Score()
    for document in read_labels(split):
        total.add(score_document(pdfs / document.name, document))
    # Plain numbers, so that a failure shows no single fault of the held-out half: nobody is to tune for them.
    precision, recall = total.strict_precision, total.strict_recall
    print(score_figures.line(split, total))
    assert precision >= least_precision
    assert recall >= least_recall
