"""Figures and tables as manuals set them: code, bitmap fonts, frames with titles, appendices. One class of failure a test."""

import pytest

from tests.data.pdf_maker import COURIER, HELVETICA, bitmap_text, paragraph, plot, rule, text, write_pdf
from tests.data.pdf_reading import BODY, extract, of_kind, texts_of

LISTING = ["for (i = 0; i < n; i++) {", "    sum += values[i];", "    count += 1;", "}", "return sum / count;"]


def listing(x: float, y: float, size: float = 9) -> str:
    return "".join(text(x, y - 11 * i, line, COURIER, size) for i, line in enumerate(LISTING))


def frame(x: float, y: float, width: float, height: float) -> str:
    return f"0.5 w {x} {y} {width} {height} re S\n"


def test_a_listing_in_a_bitmap_font_is_read_and_known_as_code(tmp_path):
    # The size in the file is one pixel: far below what anybody could read.
    code = "".join(bitmap_text(84, 660 - 12 * i, line) for i, line in enumerate(LISTING))
    page = paragraph(72, 780, BODY) + code + text(180, 585, "Figure 1: A loop that adds numbers.") + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["inner_text"].split() == " ".join(LISTING).split()
    assert figure["box"][1] <= 842 - 666
    assert figure["box"][3] >= 842 - 613


def test_a_listing_some_lines_away_from_its_caption_is_found(tmp_path):
    page = paragraph(72, 780, BODY) + listing(84, 680) + text(180, 592, "Figure 1: A loop.") + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["inner_text"].split() == " ".join(LISTING).split()


def test_code_beside_a_drawing_is_part_of_the_figure(tmp_path):
    page = paragraph(72, 780, BODY) + listing(72, 640, 10) + plot(330, 560, 180, 120)
    page += text(180, 530, "Figure 1: A program and its output.") + paragraph(72, 490, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([72, 842 - 680, 510, 842 - 560], abs=6)
    assert "count += 1;" in figure["inner_text"]


def test_code_in_a_frame_before_a_figure_is_no_part_of_it(tmp_path):
    shade = "0.93 g 72 640 450 60 re f 0 g\n"
    page = paragraph(72, 780, BODY) + shade + listing(84, 690) + plot(200, 480, 200, 120)
    page += text(220, 455, "Figure 1: A zigzag.") + paragraph(72, 420, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([200, 842 - 600, 400, 842 - 480], abs=6)


def test_frames_with_titles_in_their_upper_rules_are_one_figure(tmp_path):
    def titled(top: float) -> str:
        sides = f"0.5 w 72 {top} m 72 {top - 70} l S 522 {top} m 522 {top - 70} l S\n"
        upper = rule(72, top, 190) + text(266, top - 3, "The first format", COURIER, 6) + rule(328, top, 194)
        return upper + sides + rule(72, top - 70, 450) + listing(73, top - 15)

    page = paragraph(72, 780, BODY) + titled(720) + titled(640) + text(200, 545, "Figure 1: Two formats.")
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page + paragraph(72, 500, BODY)]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([72, 842 - 723, 522, 842 - 570], abs=6)


def test_no_two_captions_have_one_picture(tmp_path):
    # The first caption's figure is missing.
    page = paragraph(72, 780, BODY) + text(180, 720, "Figure 1: Nothing above.") + plot(150, 520, 300, 150)
    page += text(180, 496, "Figure 2: A zigzag.") + paragraph(72, 460, BODY)
    records, counts = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    assert [figure["number"] for figure in of_kind(records, "figure")] == ["2"]
    assert counts["figures"]["dropped"] == {"no_region": 1}


def test_a_caption_right_below_the_end_of_a_sentence(tmp_path):
    rows = "".join(text(160 + 90 * j, 690 - 14 * i, f"cell {i} {j}") for i in range(4) for j in range(3))
    table = rule(155, 702, 280) + rows + rule(155, 640, 280)
    page = paragraph(72, 780, BODY) + text(
        72, 744, "The values are in the table that is below this line of text, for all of them."
    )
    page += text(72, 732, "Table 1: Values.") + table + paragraph(72, 600, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert table["caption"] == "Table 1: Values."


def test_a_table_without_rules_some_lines_away_from_its_caption(tmp_path):
    rows = "".join(text(200 + 90 * j, 690 - 14 * i, f"cell {i} {j}") for i in range(4) for j in range(3))
    page = paragraph(72, 780, BODY) + rows + text(230, 606, "Table 1: Cells.") + paragraph(72, 560, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (table,) = of_kind(records, "table")
    assert table["inner_text"].startswith("cell 0 0")
    assert "cell 3 2" in table["inner_text"]


def test_papers_in_an_appendix_keep_their_style_of_captions(tmp_path):
    def page(caption: str) -> str:
        return paragraph(72, 780, BODY) + plot(150, 520, 300, 150) + text(180, 496, caption) + paragraph(72, 460, BODY)

    captions = [f"Figure 2.{i}: A zigzag." for i in range(1, 4)] + [f"Fig. {i}. A zigzag." for i in range(1, 6)]
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page(caption) for caption in captions]), tmp_path / "out")
    assert [figure["caption"] for figure in of_kind(records, "figure")] == captions


def test_header_rows_at_the_top_of_some_pages_are_no_running_heads(tmp_path):
    pages = []
    for i in range(12):
        head = text(72, 800, "The Manual of Tests") + text(290, 40, str(i + 1))
        table = text(200, 775, "Name") + text(300, 775, "Value") + rule(190, 770, 200)
        table += "".join(text(200, 758 - 12 * row, f"name {row}") + text(300, 758 - 12 * row, str(row)) for row in range(4))
        table += rule(190, 716, 200) + text(200, 690, f"Table {i + 1}: Names.")
        pages.append(head + (table if i < 3 else "") + paragraph(72, 640, BODY * 5))
    records, _ = extract(write_pdf(tmp_path / "a.pdf", pages), tmp_path / "out")
    tables = of_kind(records, "table")
    assert len(tables) == 3
    assert all(table["inner_text"].startswith("Name Value") for table in tables)
    assert "The Manual of Tests" not in " ".join(texts_of(records))


def test_a_sideways_caption_turns_a_page_whose_labels_are_upright(tmp_path):
    labels = "".join(text(250 + 30 * i, 300 + 40 * i, f"label {i}", HELVETICA, 6) for i in range(5))
    caption = "BT /F1 10 Tf 0 1 -1 0 480 300 Tm (Figure 1: A drawing that lies on its side.) Tj ET\n"
    page = frame(240, 250, 200, 300) + labels + caption
    body = paragraph(72, 760, BODY * 6)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [body, page, body]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([240, 842 - 550, 440, 842 - 250], abs=6)


def test_a_figure_may_be_a_strip(tmp_path):
    strip = "0.5 g 100 600 400 12 re f 0 g\n"
    page = paragraph(72, 780, BODY) + strip + text(180, 575, "Figure 1: A scale of grays.") + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([100, 842 - 612, 500, 842 - 600], abs=6)


def test_a_diagram_whose_boxes_hold_text_is_taken_whole(tmp_path):
    boxes = "".join(frame(72 + 130 * i, 600, 110, 24) + text(80 + 130 * i, 608, f"the step {i + 1}") for i in range(3))
    last = "".join(f"0.5 w {x} 600 m {x} 624 l S\n" for x in (462, 490, 518)) + rule(462, 600, 56) + rule(462, 624, 56)
    page = paragraph(72, 780, BODY) + boxes + last + text(180, 575, "Figure 1: Steps.") + paragraph(72, 540, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page]), tmp_path / "out")
    (figure,) = of_kind(records, "figure")
    assert figure["box"] == pytest.approx([72, 842 - 624, 518, 842 - 600], abs=6)
