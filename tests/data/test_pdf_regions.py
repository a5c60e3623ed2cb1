"""Figures and tables in the layouts that went wrong once: each test is one class of failure, on a page that it wrote itself."""

import pytest
from PIL import Image

from tests.data.pdf_maker import COURIER, HELVETICA, Form, column, paragraph, place, plot, rule, text, write_pdf
from tests.data.pdf_reading import BODY, extract, of_kind, texts_of


def frame(x: float, y: float, width: float, height: float) -> str:
    return f"0.5 w {x} {y} {width} {height} re S\n"


def test_a_table_below_its_caption_keeps_its_first_row(tmp_path):
    # The header row follows the caption at the pitch of its lines, in its font and size.
    rows = [("method", "error", "time"), *((f"method {c}", f"0.{i}", str(i)) for i, c in enumerate("abcde"))]
    cells = "".join(text(160 + 90 * j, 608 - 12 * i, cell) for i, row in enumerate(rows) for j, cell in enumerate(row))
    page = paragraph(72, 760, BODY) + text(150, 620, "Table 1: Errors of methods.") + cells + paragraph(72, 480, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert table["caption"] == "Table 1: Errors of methods."
    assert table["inner_text"].startswith("method error time method a")
    assert table["box"][1] < 842 - 616


def test_a_table_above_its_caption_reaches_to_its_header_row(tmp_path):
    rows = [("Machine", "Serial", "Parallel"), *((f"machine {c}", f"0.{i}", str(i)) for i, c in enumerate("abcde"))]
    cells = "".join(text(160 + 90 * j, 680 - 14 * i, cell) for i, row in enumerate(rows) for j, cell in enumerate(row))
    rules = rule(155, 676, 230) + rule(155, 605, 230)
    page = paragraph(72, 780, BODY) + cells + rules + text(150, 580, "Table 1: Times of machines.") + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert table["inner_text"].startswith("Machine Serial Parallel machine a")
    assert "0.4" in table["inner_text"]


def test_rows_that_look_like_text_do_not_end_a_ruled_table(tmp_path):
    rows = [f"Method {c} is described in one long sentence that is as wide as the text of the page itself is" for c in "abcd"]
    page = paragraph(72, 780, BODY) + text(72, 700, "Table 1: Methods.") + rule(72, 690, 450)
    page += paragraph(72, 676, rows) + rule(72, 630, 450) + paragraph(72, 600, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert all(f"Method {c}" in table["inner_text"] for c in "abcd")
    assert table["box"] == pytest.approx([72, 842 - 690, 522, 842 - 630], abs=6)
    assert "Method a" not in " ".join(texts_of(records))


LISTING = ["for (i = 0; i < n; i++) {", "    sum += values[i];", "    count += 1;", "}", "return sum / count;"]


@pytest.mark.parametrize("framed", ["box", "rules", "shade", "bare"])
@pytest.mark.parametrize("above", [True, False], ids=["caption_below", "caption_above"])
def test_a_listing_captioned_as_a_figure_is_cropped_whole(tmp_path, framed, above):
    code = "".join(text(84, 660 - 11 * i, line, COURIER, 9) for i, line in enumerate(LISTING))
    frames = {
        "box": frame(72, 605, 450, 70),
        "rules": rule(72, 675, 450) + rule(72, 605, 450),
        "shade": "0.93 g 72 605 450 70 re f 0 g\n",
        "bare": "",
    }
    caption = text(180, 588 if above else 684, "Figure 1: A loop that adds numbers.")
    page = paragraph(72, 780, BODY) + frames[framed] + code + caption + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["inner_text"].split() == " ".join(LISTING).split()
    assert figure["box"][1] <= 842 - 666
    assert figure["box"][3] >= 842 - 616
    assert "running" not in figure["inner_text"]


def test_a_listing_above_a_figure_is_not_part_of_it(tmp_path):
    code = "".join(text(72, 690 - 11 * i, line, COURIER, 10) for i, line in enumerate(LISTING))
    page = paragraph(72, 780, BODY) + code + plot(150, 460, 300, 150) + text(180, 436, "Figure 1: A plot.")
    page += paragraph(72, 400, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([150, 232, 450, 382], abs=6)


def test_a_caption_goes_on_over_sub_and_superscripts(tmp_path):
    line = text(72, 436, "Figure 1: Concentrations of particles in units of [ug/m") + text(293, 440, "3", size=6)
    line += text(297, 436, "] at all the stations that")
    line += text(72, 424, "were open in the year, with the mean x") + text(228, 421, "i", size=6) + text(232, 424, "of each.")
    page = paragraph(72, 760, BODY) + plot(150, 460, 300, 150) + line + paragraph(72, 380, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    caption = figure["caption"].replace(" ", "")
    assert (
        caption == "Figure1:Concentrationsofparticlesinunitsof[ug/m3]atallthestationsthatwereopenintheyear,withthemeanxiofeach."
    )
    assert "stations" not in " ".join(texts_of(records))


def test_a_page_without_body_text_gives_its_figures(tmp_path):
    first = (
        plot(100, 500, 400, 250)
        + text(180, 470, "Figure 1: Above.")
        + plot(100, 150, 400, 250)
        + text(180, 120, "Figure 2: Below.")
    )
    pages = [paragraph(72, 760, BODY * 10), first, paragraph(72, 760, BODY * 10)]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    above, below = of_kind(records, "figure")
    assert above["box"] == pytest.approx([100, 92, 500, 342], abs=6)
    assert below["box"] == pytest.approx([100, 442, 500, 692], abs=6)


def test_a_plot_of_many_paths_is_cropped_whole(tmp_path):
    dots = "".join(f"{150 + (i * 37) % 300} {460 + (i * 61) % 150} 1 1 re f\n" for i in range(20_000))
    page = paragraph(72, 760, BODY) + dots + text(280, 448, "axis", HELVETICA, 7) + text(180, 430, "Figure 1: Many dots.")
    page += paragraph(72, 400, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([150, 231, 451, 394], abs=6)
    assert figure["inner_text"] == "axis"


def test_a_page_of_more_objects_than_anybody_draws_is_dropped_and_the_others_are_kept(tmp_path):
    bomb = "0 0 m 9 9 l S\n" * 250_000 + text(72, 700, "bomb")
    records, counts = extract(write_pdf(tmp_path / "a.pdf", [paragraph(72, 760, BODY), bomb]), tmp_path / "out")
    assert counts["pages"] == {"input": 2, "kept": 1, "dropped": {"too_many_objects": 1}}
    assert texts_of(records) == [" ".join(BODY)]


def test_captions_above_figures_are_told_from_captions_below(tmp_path):
    # Both sides of every caption have a figure: the first page decides which one is its own.
    def figure(number: int, top: float) -> str:
        return text(180, top, f"Figure {number}: Its drawing is below.") + plot(150, top - 170, 300, 150)

    first = paragraph(72, 780, BODY) + figure(1, 700) + paragraph(72, 480, BODY)
    second = paragraph(72, 800, BODY) + figure(2, 740) + figure(3, 540) + figure(4, 340) + paragraph(72, 140, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [first, second]), tmp_path / "out")
    boxes = {record["number"]: record["box"] for record in of_kind(records, "figure")}
    assert [boxes[number][1] for number in "1234"] == pytest.approx([162, 122, 322, 522], abs=6)


def test_figures_side_by_side_are_told_apart(tmp_path):
    page = paragraph(72, 780, BODY) + plot(80, 520, 200, 150) + plot(320, 520, 200, 150)
    page += text(90, 500, "Figure 1: The left of the two.") + text(330, 500, "Figure 2: The right of the two.")
    page += paragraph(72, 460, BODY * 5)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    left, right = of_kind(records, "figure")
    assert (left["caption"], right["caption"]) == ("Figure 1: The left of the two.", "Figure 2: The right of the two.")
    assert left["box"] == pytest.approx([80, 172, 280, 322], abs=6)
    assert right["box"] == pytest.approx([320, 172, 520, 322], abs=6)


def test_figures_in_columns_and_across_them(tmp_path):
    page = plot(72, 640, 450, 130) + text(
        72, 620, "Figure 1: A drawing across both of the columns of the page, with a caption that is as wide as it.", size=9
    )
    page += column(72, 590, 15) + column(310, 590, 5)
    page += (
        plot(320, 400, 180, 110) + text(310, 380, "Figure 2: In one column.", size=9) + column(310, 350, 8) + column(72, 400, 12)
    )
    pages = [column(72, 780, 55) + column(310, 780, 55), page, column(72, 780, 55) + column(310, 780, 55)]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    wide, narrow = of_kind(records, "figure")
    assert wide["box"] == pytest.approx([72, 72, 522, 202], abs=6)
    assert narrow["box"] == pytest.approx([320, 332, 500, 442], abs=6)


def test_running_heads_and_their_rules_are_not_part_of_a_figure(tmp_path):
    pages = []
    for i in range(5):
        head = text(72, 800, "The Journal of Tests") + rule(72, 795, 450) + text(290, 40, str(i + 1))
        body = paragraph(72, 480, BODY * 8)
        pages.append(head + plot(150, 560, 300, 150) + text(180, 530, f"Figure {i + 1}: At the top.") + body)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    boxes = [record["box"] for record in of_kind(records, "figure")]
    assert len(boxes) == 5
    assert all(box == pytest.approx([150, 132, 450, 282], abs=6) for box in boxes)


def test_a_page_that_is_a_clipped_form_gives_the_figure_that_is_seen(tmp_path):
    whole = paragraph(72, 760, BODY) + plot(150, 460, 300, 150) + text(180, 436, "Figure 1: A zigzag.") + paragraph(72, 400, BODY)
    hidden = plot(0, 0, 595, 60) + text(72, 20, "Figure 2: This one is cut off.")
    form = Form(whole + hidden, box=(0, 100, 595, 842))
    records, counts = extract(write_pdf(tmp_path / "a.pdf", [place("X1")], forms={"X1": form}), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert counts["figures"]["input"] == 1
    assert figure["box"] == pytest.approx([150, 232, 450, 382], abs=6)


def test_labels_that_are_read_upwards_are_one_piece(tmp_path):
    label = "BT /F2 8 Tf 0 1 -1 0 162 500 Tm (counts per hour) Tj ET\n"
    page = paragraph(72, 760, BODY) + plot(150, 460, 300, 150) + label + text(180, 436, "Figure 1: A zigzag.")
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page + paragraph(72, 400, BODY)]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert "counts per hour" in figure["inner_text"]


def sideways(lines: list[tuple[float, float, str, str, float]]) -> str:
    """Lines that are read upwards: (x of the baseline, y of the start, text, font, size)."""
    return "".join(f"BT /{font} {size} Tf 0 1 -1 0 {x} {y} Tm ({words}) Tj ET\n" for x, y, words, font, size in lines)


def test_a_page_set_sideways_gives_its_table_upright(tmp_path):
    rows = [(200 + 14.0 * i, 200.0 + 120 * j, f"cell {i} {j}", "F1", 10.0) for i in range(6) for j in range(4)]
    caption = [(160.0, 200.0, "Table 1: A table that is too wide for the page and stands on its side.", "F1", 10.0)]
    rules = "0.5 w 186 195 m 186 640 l S 276 195 m 276 640 l S\n"
    body = paragraph(72, 760, BODY * 6)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [body, sideways(caption + rows) + rules, body]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert table["box"] == pytest.approx([183, 842 - 640, 279, 842 - 195], abs=6)
    assert table["inner_text"].startswith("cell 0 0 cell 0 1 cell 0 2")
    # The picture is turned so that it can be read: wider than high.
    picture = Image.open(tmp_path / "out" / table["image"])
    assert picture.width > 3 * picture.height


@pytest.mark.parametrize("left", [True, False], ids=["caption_right", "caption_left"])
def test_a_caption_beside_its_figure(tmp_path, left):
    x, caption_x = (72, 340) if left else (300, 72)
    page = paragraph(72, 780, BODY) + plot(x, 520, 220, 170) + paragraph(72, 460, BODY)
    page += paragraph(caption_x, 640, ["Figure 1: A caption that", "stands beside its figure", "and has a few short lines."])
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([x, 842 - 690, x + 220, 842 - 520], abs=6)
    assert figure["caption"].endswith("short lines.")


def test_labels_of_panels_between_drawing_and_caption_belong_to_the_figure(tmp_path):
    page = paragraph(72, 780, BODY) + plot(72, 540, 200, 140) + plot(320, 540, 200, 140)
    page += text(150, 500, "(a) The first of them.") + text(390, 500, "(b) The second.")
    page += text(180, 470, "Figure 1: Two panels.") + paragraph(72, 430, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert "(a) The first of them." in figure["inner_text"]
    assert figure["box"][3] > 842 - 500


def test_a_footnote_above_a_figure_at_the_foot_of_a_page_is_no_part_of_it(tmp_path):
    page = paragraph(72, 780, BODY * 5) + rule(72, 560, 120) + text(82, 548, "1 A footnote about the text above.", size=8)
    page += plot(150, 350, 300, 150) + text(180, 326, "Figure 1: At the foot.")
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page, paragraph(72, 780, BODY * 10)]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([150, 842 - 500, 450, 842 - 350], abs=6)


def test_every_part_of_a_table_that_goes_on_is_taken(tmp_path):
    def part(title: str) -> str:
        rows = "".join(text(160, 585 - 12 * i, f"row {i}     {i * i}") for i in range(5))
        return text(150, 620, title) + rule(150, 600, 200) + rule(150, 530, 200) + rows + paragraph(72, 480, BODY * 5)

    pages = [part("Table 1: Squares of small numbers."), part("Table 1: Squares of small numbers (continued).")]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    assert [(table["number"], table["page"]) for table in of_kind(records, "table")] == [("1", 1), ("1", 2)]


def test_a_part_of_a_table_may_be_marked_by_a_short_word(tmp_path):
    def part(title: str) -> str:
        rows = "".join(text(160, 585 - 12 * i, f"row {i}     {i * i}") for i in range(5))
        return text(150, 620, title) + rule(150, 600, 200) + rule(150, 530, 200) + rows + paragraph(72, 480, BODY * 5)

    # "~" stands for a typographer's apostrophe.
    pages = [part("Table 1: Squares of small numbers."), part("Table 1: Squares (cont~d)").replace("/F1 10", "/F4 10", 1)]
    pdf = write_pdf(tmp_path / "a.pdf", pages, unicode_map={"~": 0x2019})
    records, _ = extract(pdf, tmp_path / "out")
    assert [(table["number"], table["page"]) for table in of_kind(records, "table")] == [("1", 1), ("1", 2)]


def test_a_caption_that_comes_back_on_the_next_page_is_that_of_a_part(tmp_path):
    table = rule(150, 600, 200) + "".join(text(160, 585 - 12 * i, f"row {i}     {i * i}") for i in range(5)) + rule(150, 530, 200)
    part = text(150, 620, "Table 1: Squares of small numbers.") + table + paragraph(72, 480, BODY * 5)
    pages = [part, part, paragraph(72, 780, BODY * 15), part]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    assert [table["page"] for table in of_kind(records, "table")] == [1, 2]


def test_the_list_of_figures_holds_no_captions(tmp_path):
    entry = text(72, 700, "Figure 1: A zigzag . . . . . . . . . . . . . . . . . . . . . . . . . . . . . 2")
    page = paragraph(72, 760, BODY) + plot(150, 460, 300, 150) + text(180, 436, "Figure 1: A zigzag.") + paragraph(72, 400, BODY)
    records, counts = extract(write_pdf(tmp_path / "a.pdf", [entry + paragraph(72, 600, BODY), page]), tmp_path / "out")
    assert counts["figures"] == {"input": 1, "kept": 1, "dropped": {}}
    assert of_kind(records, "figure")[0]["page"] == 2


def test_the_first_lines_of_pages_with_double_spacing_are_no_running_heads(tmp_path):
    pages = [
        "".join(text(72, 760 - 24 * i, f"Line {i} of page {word} in a text with double spacing.") for i in range(25))
        for word in "abcde"
    ]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    joined = " ".join(texts_of(records))
    assert all(f"Line 0 of page {word}" in joined for word in "abcde")
