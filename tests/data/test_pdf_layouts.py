"""Layouts that journals, slides and web pages have: labels above titles, frames around captions, pictures of letters."""

import pytest

from moexpand.data.pdf_bands import off_caption
from moexpand.data.pdf_captions import Caption
from moexpand.data.pdf_text import Line
from tests.data.pdf_maker import COURIER, HELVETICA, paragraph, plot, rule, text, write_pdf
from tests.data.pdf_reading import BODY, extract, of_kind

ITALIC = HELVETICA
"""Stands for any font that the running text does not have."""


def frame(x: float, y: float, width: float, height: float) -> str:
    return f"0.5 w {x} {y} {width} {height} re S\n"


def cells(x: float, y: float, rows: int, columns: int = 3, size: float = 10, pitch: float = 14) -> str:
    return "".join(text(x + 80 * j, y - pitch * i, f"cell {i} {j}", size=size) for i in range(rows) for j in range(columns))


def only(tmp_path, page: str, kind: str = "figure", **options):
    """The only figure or table of a document of this page and one of running text."""
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)], **options), tmp_path / "out")
    (found,) = of_kind(records, kind)
    return found


def test_a_page_that_inherits_its_size(tmp_path):
    # PDFium's media and crop box are those of letter paper then, whatever the page's size.
    page = paragraph(72, 580, BODY) + plot(150, 300, 200, 130) + text(180, 276, "Figure 1: A zigzag.") + paragraph(72, 240, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page], media=(500, 650), inherited=True), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([150, 650 - 430, 350, 650 - 300], abs=6)


def test_captions_at_the_top_of_many_pages_are_no_running_heads(tmp_path):
    def page(number: int) -> str:
        table = rule(160, 740, 240) + cells(165, 724, 5) + rule(160, 660, 240)
        return text(180, 760, f"Table {number}: Some cells of {'abcde'[number]}.") + table + paragraph(72, 600, BODY * 4)

    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page(i) for i in range(1, 5)]), tmp_path / "out")
    assert [table["number"] for table in of_kind(records, "table")] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("title", "size", "font", "step"), [
    ("Cells of a table.", 10, "F1", 12),
    ("CELLS OF A TABLE WITH A TITLE IN SMALL CAPITALS.", 7.5, "F1", 11),
    ("Cells of a table below an empty line.", 10, ITALIC, 23),
])  # fmt: skip
def test_a_title_below_its_label(tmp_path, title, size, font, step):
    caption = text(160, 720, "Table 1") + text(160, 720 - step, title, font, size)
    table = rule(160, 690, 240) + cells(165, 676, 5) + rule(160, 612, 240)
    found = only(tmp_path, paragraph(72, 780, BODY) + caption + table + paragraph(72, 570, BODY), "table")
    assert found["caption"] == f"Table 1 {title}"
    assert found["box"] == pytest.approx([160, 842 - 690, 400, 842 - 612], abs=6)


def test_a_label_that_a_hyphen_parts_from_its_title(tmp_path):
    page = (
        paragraph(72, 780, BODY) + plot(150, 540, 300, 150) + text(180, 516, "Figure 1 - the zigzag.") + paragraph(72, 480, BODY)
    )
    assert only(tmp_path, page)["caption"] == "Figure 1 - the zigzag."


def test_the_first_label_of_a_figure_is_not_the_end_of_the_caption_above_it(tmp_path):
    page = paragraph(72, 780, BODY) + text(72, 720, "Figure 1: What is drawn below.") + text(82, 709, "50", HELVETICA)
    figure = only(tmp_path, page + plot(100, 560, 250, 150) + paragraph(72, 510, BODY))
    assert figure["caption"] == "Figure 1: What is drawn below."
    assert figure["inner_text"].split()[0] == "50"


def test_the_rows_of_another_table_do_not_belong_to_a_listing(tmp_path):
    lines = ["total = 0", "for i in range(9):", "    total += i", "    print(i)", "end"]
    code = "".join(text(84, 650 - 11 * i, line, COURIER, 9) for i, line in enumerate(lines))
    table = text(160, 752, "Table 1: Some cells.") + rule(160, 745, 240) + cells(165, 732, 5) + rule(160, 672, 240)
    page = paragraph(72, 800, BODY) + table + code + text(84, 588, "Figure 1: A loop.") + paragraph(72, 550, BODY)
    figure = only(tmp_path, page)
    assert figure["inner_text"].split() == " ".join(lines).split()


def test_the_last_word_of_a_paragraph_at_the_top_of_a_page(tmp_path):
    page = (
        text(72, 780, "state.") + plot(200, 600, 200, 165) + text(220, 580, "Figure 1: A zigzag.") + paragraph(72, 540, BODY * 3)
    )
    assert only(tmp_path, page)["box"] == pytest.approx([200, 842 - 765, 400, 842 - 600], abs=6)


def test_a_table_ends_where_the_next_figure_begins(tmp_path):
    # A page of floats: no text parts the table from the figure.
    table = text(160, 780, "Table 1: Some cells.") + rule(160, 770, 240) + cells(165, 756, 5) + rule(160, 690, 240)
    page = table + plot(100, 400, 350, 200) + text(180, 376, "Figure 1: A zigzag.")
    assert only(tmp_path, page)["box"] == pytest.approx([100, 842 - 600, 450, 842 - 400], abs=6)


def test_text_between_rules_may_be_a_figure(tmp_path):
    page = (
        paragraph(72, 780, BODY) + rule(90, 716, 414) + paragraph(90, 700, [line[:78] for line in BODY * 2]) + rule(90, 632, 414)
    )
    figure = only(tmp_path, page + text(180, 612, "Figure 1: What was said.") + paragraph(72, 570, BODY))
    assert figure["box"] == pytest.approx([90, 842 - 716, 504, 842 - 632], abs=6)


def test_bubbles_left_and_right_are_one_figure(tmp_path):
    def bubble(x: float, y: float) -> str:
        return frame(x, y, 260, 40) + paragraph(
            x + 8, y + 26, ["What somebody says in a conversation of two", "is in such a frame."]
        )

    page = paragraph(72, 800, BODY) + bubble(90, 690) + bubble(240, 641) + bubble(90, 592)
    figure = only(tmp_path, page + text(180, 572, "Figure 1: A conversation.") + paragraph(72, 530, BODY))
    assert figure["box"] == pytest.approx([90, 842 - 730, 500, 842 - 592], abs=6)


def test_rows_of_letters_may_be_a_figure(tmp_path):
    rows = ["1: while n > 0 do", "2:   n = n - 1", "3: end while", "4: return n"]
    page = paragraph(72, 780, BODY) + paragraph(160, 700, rows) + text(140, 640, "Figure 1: A loop that counts down.")
    figure = only(tmp_path, page + paragraph(72, 600, BODY))
    assert figure["inner_text"].split() == " ".join(rows).split()


def test_a_formula_of_the_text_is_not_the_figure_of_a_caption(tmp_path):
    page = paragraph(72, 780, BODY) + text(200, 738, "x = a + b") + text(200, 724, "y = a - b")
    page += text(180, 690, "Figure 1: Its drawing is missing.") + paragraph(72, 650, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)]), tmp_path / "out")
    assert of_kind(records, "figure") == []


@pytest.mark.parametrize("ground", ["0.95 g 90 500 420 240 re f 0 g\n", frame(90, 500, 420, 240)])
def test_a_frame_around_figure_and_caption(tmp_path, ground):
    page = paragraph(72, 790, BODY) + ground + plot(200, 570, 180, 120) + text(180, 520, "Figure 1: A zigzag.")
    figure = only(tmp_path, page + paragraph(72, 460, BODY))
    assert figure["box"] == pytest.approx([200, 842 - 690, 380, 842 - 570], abs=6)


def test_bars_along_the_edges_of_a_slide(tmp_path):
    slide = "0.2 0.2 0.6 rg 0 250 400 50 re f 0 0 400 14 re f 0 g\n"
    slide += plot(120, 90, 160, 120) + text(130, 70, "Figure 1: A zigzag.")
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [slide], media=(400, 300)), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([120, 300 - 210, 280, 300 - 90], abs=6)


def test_the_last_row_of_a_table_with_a_rule_above_each_row(tmp_path):
    table = "".join(rule(160, 700 - 18 * i, 250) + cells(165, 688 - 18 * i, 1) for i in range(6))
    page = paragraph(72, 780, BODY) + text(180, 712, "Table 1: Some cells.") + table + paragraph(72, 540, BODY)
    assert only(tmp_path, page, "table")["box"] == pytest.approx([160, 842 - 700, 410, 842 - 597], abs=6)


def test_rows_below_the_rules_of_a_head_that_are_all_a_table_has(tmp_path):
    head = rule(160, 700, 250) + cells(165, 688, 1) + rule(160, 684, 250)
    rows = cells(165, 672, 6) + text(165, 588, "a lone cell") + cells(165, 574, 1) + text(300, 556, "continued overleaf", size=8)
    page = paragraph(72, 780, BODY) + text(180, 712, "Table 1: Some cells.") + head + rows + paragraph(72, 520, BODY)
    assert only(tmp_path, page, "table")["box"] == pytest.approx([160, 842 - 700, 410, 842 - 572], abs=6)


def test_the_only_row_of_a_table_before_the_end_of_the_page(tmp_path):
    head = rule(160, 98, 250) + cells(165, 86, 1) + rule(160, 82, 250)
    page = paragraph(72, 780, BODY * 15) + text(180, 110, "Table 1: Some cells.") + head + cells(165, 70, 1)
    assert only(tmp_path, page, "table")["box"] == pytest.approx([160, 842 - 98, 410, 842 - 68], abs=6)


def test_a_title_in_the_margin_of_a_plot(tmp_path):
    title = text(240, 718, "Residuals of the model", HELVETICA, 10)
    page = paragraph(72, 780, BODY) + title + plot(150, 540, 300, 140) + text(180, 516, "Figure 1: A zigzag.")
    assert only(tmp_path, page + paragraph(72, 480, BODY))["box"][1] == pytest.approx(842 - 726, abs=6)


def test_lines_of_pictures_in_cells_are_no_rules_of_the_table(tmp_path):
    def row(y: float) -> str:
        code = "".join(text(250, y + 30 - 11 * i, f"line {i} of the code that draws it", COURIER, 9) for i in range(4))
        return f"0.5 w 180 {y} m 205 {y + 40} l 230 {y} l S\n" + rule(180, y + 36, 50) + rule(180, y + 18, 50) + code

    page = paragraph(72, 780, BODY) + text(180, 724, "Table 1: Pictures and code.") + row(672) + row(614)
    found = only(tmp_path, page + paragraph(72, 540, BODY), "table")
    assert found["box"] == pytest.approx([180, 842 - 712, 424, 842 - 610], abs=6)


def test_the_first_line_of_code_at_the_top_of_a_few_pages_is_no_running_head(tmp_path):
    def page(number: int) -> str:
        lines = ["set width 20", f"draw {['line', 'box', 'arc', 'oval'][number]}", "close", "print"]
        code = "".join(text(84, 780 - 11 * i, line, COURIER, 9) for i, line in enumerate(lines))
        return code + text(84, 724, f"Figure {number}: How it is drawn.") + paragraph(72, 690, BODY * 12)

    pages = [page(i) for i in range(4)] + [paragraph(72, 780, BODY * 15) for _ in range(12)]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    assert [figure["inner_text"].split()[0] for figure in of_kind(records, "figure")] == ["set"] * 4


def test_white_parts_two_tables_of_one_width(tmp_path):
    def table(y: float) -> str:
        return rule(160, y, 250) + cells(165, y - 14, 5) + rule(160, y - 80, 250)

    page = paragraph(72, 800, BODY) + text(180, 738, "Table 1: Some cells.") + table(730)
    page += table(600) + text(180, 505, "Table 2: More cells, whose caption is below.") + paragraph(72, 460, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)]), tmp_path / "out")
    first, second = of_kind(records, "table")
    assert first["box"] == pytest.approx([160, 842 - 730, 410, 842 - 650], abs=6)
    assert second["box"] == pytest.approx([160, 842 - 600, 410, 842 - 520], abs=6)


@pytest.mark.parametrize("between", [
    text(280, 735, "a + b") + "0.5 w 275 732 m 315 732 l S\n" + text(290, 720, "c"),
    rule(72, 722, 450),
    text(72, 722, "A heading", "F2", 12),
    text(72, 722, "$ make all", COURIER, 9),
], ids=["formula", "rule", "heading", "code"])  # fmt: skip
def test_what_stands_between_text_and_figure_is_no_part_of_it(tmp_path, between):
    page = paragraph(72, 780, BODY) + between + plot(200, 560, 200, 135) + text(220, 540, "Figure 1: A zigzag.")
    figure = only(tmp_path, page + paragraph(72, 500, BODY))
    assert figure["box"] == pytest.approx([200, 842 - 695, 400, 842 - 560], abs=6)


def test_titles_of_plots_at_the_top_of_pages_are_no_running_heads(tmp_path):
    def page(number: int) -> str:
        figure = text(250, 790, "Residuals of the model", HELVETICA, 9) + plot(150, 600, 300, 170)
        return figure + text(180, 576, f"Figure {number}: The residuals.") + paragraph(72, 540, BODY * 4)

    pages = [page(i) if i < 5 else paragraph(72, 780, BODY * 15) for i in range(1, 9)]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    figures = of_kind(records, "figure")
    assert len(figures) == 4
    assert all("Residuals of the model" in figure["inner_text"] for figure in figures)


def test_code_below_a_table_without_rules_is_no_part_of_it(tmp_path):
    code = "".join(text(110, 618 - 12 * i, line, COURIER, 9) for i, line in enumerate(["$ make all", "$ make test"]))
    page = paragraph(72, 780, BODY) + text(180, 720, "Table 1: Some cells.") + cells(165, 700, 5) + code
    found = only(tmp_path, page + paragraph(72, 560, BODY), "table")
    assert "make" not in found["inner_text"]
    assert "cell 4 2" in found["inner_text"]


def test_boxes_of_text_that_arrows_join_are_taken_whole(tmp_path):
    def box(x: float, y: float) -> str:
        return frame(x, y, 150, 36) + paragraph(x + 6, y + 22, ["What is done in this step", "of the whole."])

    arrow = "1 w 345 690 m 175 646 l S\n"
    page = paragraph(72, 800, BODY) + box(100, 690) + box(300, 690) + box(100, 610) + box(300, 610) + arrow
    figure = only(tmp_path, page + text(200, 590, "Figure 1: Four steps.") + paragraph(72, 550, BODY))
    assert figure["box"] == pytest.approx([100, 842 - 726, 450, 842 - 610], abs=6)


def test_rows_of_numbers_are_no_running_text(tmp_path):
    rows = "".join(text(84, 690 - 14 * i, f"the name {i}") + text(290, 690 - 14 * i, "14.17") for i in range(5))
    numbers = "".join(text(84, 620 - 14 * i, f"another name {i}  " + "  ".join(["15.790001"] * 6)) for i in range(4))
    page = paragraph(72, 780, BODY) + text(180, 706, "Table 1: Some numbers.") + rows + numbers + paragraph(72, 500, BODY)
    found = only(tmp_path, page, "table")
    assert "another name 3" in found["inner_text"]


def test_letters_that_reach_below_the_caption_are_not_in_the_picture():
    # The boxes of many fonts end above their letters' tails.
    line = Line("Figure 1: gypsy", 100, 90, 200, 100, 10, "F", False)
    caption = Caption("figure", "1", 0, [line], line.box)
    assert off_caption((90, 100, 310, 203), (93, 101.5, 307, 200), caption, up=False) == (90, 101.5, 310, 203)
    assert off_caption((90, 100, 310, 203), (93, 110, 307, 200), caption, up=False) == (90, 102, 310, 203)
