"""Figures and tables beside something: beside their captions, in margins, beside running text or beside other floats."""

import pytest

from tests.data.pdf_maker import HELVETICA, column, paragraph, plot, rule, text, write_pdf
from tests.data.pdf_reading import BODY, extract, of_kind

NARROW = [
    "This is running text that flows around a",
    "figure and goes on below it; all its lines",
    "have one pitch and end at the margin of it",
]
SIDE = ["Figure 1: A caption that", "stands beside its figure", "and has a few short lines."]


def axis_title(x: float, y: float) -> str:
    """Tick labels below a plot and the axis title below these."""
    ticks = "".join(text(x + 40 * i, y - 10, str(i), HELVETICA, 8) for i in range(5))
    return ticks + text(x + 50, y - 26, "time in seconds", HELVETICA, 9)


def cells(x: float, y: float, rows: int, columns: int = 3, name: str = "cell") -> str:
    """Rows of a table at a pitch of 14 points."""
    return "".join(text(x + 60 * j, y - 14 * i, f"{name} {i} {j}") for i in range(rows) for j in range(columns))


def figure_of(tmp_path, page: str, kind: str = "figure"):
    """The only figure or table of a document of this page and one of running text."""
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)]), tmp_path / "out")
    (found,) = of_kind(records, kind)
    return found


def test_a_caption_beside_the_foot_of_its_figure_keeps_the_axis_title(tmp_path):
    page = paragraph(72, 780, BODY) + plot(72, 560, 220, 150) + axis_title(90, 560) + paragraph(330, 560, SIDE)
    figure = figure_of(tmp_path, page + paragraph(72, 480, BODY))
    assert figure["box"] == pytest.approx([72, 842 - 710, 292, 842 - 532], abs=6)


def test_a_caption_that_is_higher_than_its_figure(tmp_path):
    # Error bars: nothing but thin lines, and labels at heights between those of the caption's lines.
    bars = "".join(rule(150 + 13 * i, 600 + 14 * i, 60) + text(90, 597 + 14 * i, f"effect {i}", HELVETICA, 7) for i in range(6))
    bars += f"0.5 w 150 590 m 150 680 l S\n{rule(150, 590, 140)}"
    caption = paragraph(330, 690, [*SIDE[:2], *(["and has more of such lines"] * 9)])
    figure = figure_of(tmp_path, paragraph(72, 780, BODY) + bars + caption + paragraph(72, 520, BODY))
    assert figure["box"] == pytest.approx([90, 842 - 680, 290, 842 - 590], abs=6)
    assert figure["caption"].count("such lines") == 9


def test_a_table_beside_its_caption(tmp_path):
    table = rule(120, 712, 180) + cells(125, 700, 7) + rule(120, 695, 180) + rule(120, 610, 180)
    page = paragraph(72, 780, BODY) + table + paragraph(360, 700, ["Table 1: Its caption is", "in the margin."])
    found = figure_of(tmp_path, page + paragraph(72, 560, BODY), "table")
    assert found["box"] == pytest.approx([120, 842 - 712, 300, 842 - 610], abs=6)


@pytest.mark.parametrize("right", [True, False])
def test_text_that_flows_around_a_figure_is_no_part_of_it(tmp_path, right):
    figure_x, text_x = (340, 72) if right else (72, 290)
    flowing = "".join(text(text_x, 720 - 12 * i, NARROW[i % 3] + " and on", size=10) for i in range(15))
    page = paragraph(72, 780, BODY) + flowing + plot(figure_x, 610, 170, 110)
    page += paragraph(figure_x, 592, ["Figure 1: A zigzag that", "is wrapped in text."], 9) + paragraph(72, 530, BODY * 3)
    figure = figure_of(tmp_path, page)
    assert figure["box"] == pytest.approx([figure_x, 842 - 720, figure_x + 170, 842 - 610], abs=6)
    assert figure["caption"] == "Figure 1: A zigzag that is wrapped in text."


def test_a_figure_in_the_margin(tmp_path):
    body = "".join(text(72, 780 - 12 * i, NARROW[i % 3] + " of the page") for i in range(50))
    page = body + plot(360, 560, 150, 90) + paragraph(360, 545, ["Figure 1: A drawing that", "is in the margin."], 8)
    figure = figure_of(tmp_path, page)
    assert figure["box"] == pytest.approx([360, 842 - 650, 510, 842 - 560], abs=6)


def test_a_paragraph_beside_a_figure_and_not_beside_its_caption(tmp_path):
    beside = "".join(text(310, 690 - 12 * i, line) for i, line in enumerate([*NARROW, *NARROW]))
    page = paragraph(72, 780, BODY) + plot(72, 580, 200, 140) + text(90, 560, "Figure 1: A zigzag.") + beside
    figure = figure_of(tmp_path, page + paragraph(72, 520, BODY))
    assert figure["box"] == pytest.approx([72, 842 - 720, 272, 842 - 580], abs=6)


def test_a_figure_and_a_table_beside_each_other(tmp_path):
    # One caption is above, one below, so that they stand at different heights.
    table = rule(330, 680, 180) + cells(335, 665, 6) + rule(330, 585, 180)
    page = paragraph(72, 780, BODY) + plot(72, 585, 200, 130) + text(90, 565, "Figure 1: A zigzag.")
    page += text(350, 690, "Table 1: Some cells.") + table + paragraph(72, 520, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)]), tmp_path / "out")
    (figure,), (found,) = of_kind(records, "figure"), of_kind(records, "table")
    assert figure["box"] == pytest.approx([72, 842 - 715, 272, 842 - 585], abs=6)
    assert found["box"] == pytest.approx([330, 842 - 680, 510, 842 - 585], abs=6)


def test_captions_side_by_side_that_begin_at_different_heights(tmp_path):
    # The second caption's line stands between the two lines of the first one.
    def table(x: float, y: float) -> str:
        return rule(x, y, 180) + cells(x + 5, y - 14, 5) + rule(x, y - 80, 180)

    first = text(72, 700, "Table 1: The first caption is of two") + text(72, 688, "lines.")
    page = paragraph(72, 780, BODY) + first + text(310, 694, "Table 2: The second one has one.")
    page += table(72, 678) + table(310, 678) + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 15)]), tmp_path / "out")
    left, right = of_kind(records, "table")
    assert left["caption"] == "Table 1: The first caption is of two lines."
    assert left["box"] == pytest.approx([72, 842 - 678, 252, 842 - 598], abs=6)
    assert right["box"] == pytest.approx([310, 842 - 678, 490, 842 - 598], abs=6)


def two_columns(tmp_path, page: str, kind: str = "figure"):
    """Figures or tables of a page in a document of two columns."""
    full = column(72, 780, 55) + column(310, 780, 55)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [full, page, full]), tmp_path / "out")
    return of_kind(records, kind)


def test_a_caption_in_one_column_beside_a_figure_that_crosses_the_gutter(tmp_path):
    page = plot(72, 640, 290, 140) + paragraph(380, 690, SIDE, 9) + column(72, 610, 40) + column(310, 610, 40)
    (figure,) = two_columns(tmp_path, page)
    assert figure["box"] == pytest.approx([72, 842 - 780, 362, 842 - 640], abs=6)


def test_a_short_caption_at_the_left_of_a_figure_across_both_columns(tmp_path):
    page = plot(72, 640, 450, 140) + text(72, 620, "Figure 1: A zigzag.", size=9) + column(72, 590, 40) + column(310, 590, 40)
    (figure,) = two_columns(tmp_path, page)
    assert figure["box"] == pytest.approx([72, 842 - 780, 522, 842 - 640], abs=6)


def test_a_table_across_both_columns_is_no_part_of_the_figure_below_it(tmp_path):
    rows = "".join(text(70 + 90 * j, 764 - 12 * i, f"cell {i} {j}", size=8) for i in range(6) for j in range(5))
    table = rule(60, 778, 450) + rows + rule(60, 696, 450)
    page = table + plot(90, 560, 180, 110) + text(72, 540, "Figure 1: A zigzag.", size=9)
    (figure,) = two_columns(tmp_path, page + column(72, 510, 35) + column(310, 680, 48))
    assert figure["box"] == pytest.approx([90, 842 - 670, 270, 842 - 560], abs=6)


def test_a_margin_caption_below_a_figure_across_text_and_margin(tmp_path):
    body = "".join(text(72, 601 - 12 * i, NARROW[i % 3] + " of the page") for i in range(30))
    page = plot(72, 620, 440, 150) + paragraph(360, 600, ["Figure 1: A drawing that", "is as wide as all."], 8) + body
    figure = figure_of(tmp_path, page)
    assert figure["box"] == pytest.approx([72, 842 - 770, 512, 842 - 620], abs=6)


def test_shades_of_every_other_row_beside_a_caption(tmp_path):
    shades = "".join(f"0.9 g 200 {690 - 40 * i} 200 20 re f 0 g\n" for i in range(4))
    rows = "".join(text(210 + 70 * j, 696 - 20 * i, f"cell {i} {j}") for i in range(8) for j in range(3))
    page = paragraph(72, 780, BODY) + shades + rows + paragraph(72, 700, ["Table 1: Rows of", "two kinds."])
    found = figure_of(tmp_path, page + paragraph(72, 480, BODY), "table")
    assert found["box"] == pytest.approx([200, 842 - 710, 400, 842 - 554], abs=6)


def test_a_figure_below_in_the_column_does_not_narrow_a_table_across_both(tmp_path):
    rows = "".join(text(110 + 95 * j, 744 - 12 * i, f"{i}{j}.25", size=9) for i in range(6) for j in range(5))
    page = text(72, 772, "Table 1: Numbers.", size=9) + rule(100, 760, 410) + rows + rule(100, 676, 410)
    page += plot(90, 540, 180, 110) + text(72, 520, "Figure 1: A zigzag.", size=9) + column(72, 490, 30) + column(310, 650, 45)
    (table,) = two_columns(tmp_path, page, "table")
    assert table["box"] == pytest.approx([100, 842 - 760, 510, 842 - 676], abs=6)
