"""Numbered display equations become pictures with their paragraphs, when they are asked for."""

import numpy as np
import pytest
from PIL import Image

from moexpand.data.document import DocumentLimits
from tests.data.pdf_maker import paragraph, plot, text, write_pdf
from tests.data.pdf_reading import BODY, extract, of_kind, texts_of

FORMULA = text(240, 662, "E = m c") + text(276, 666, "2", size=7) + text(282, 662, "+ x")
NUMBER_X = 476


def page(number: str = "(3.1)", between: str = FORMULA) -> str:
    """Two paragraphs with a formula between them; its number ends where the text ends."""
    wide = "This is running text that fills the whole width of the page and goes on so that nobody takes it for x"
    before = ["Energy and mass are related as follows, and the words of this paragraph stand before.", wide, "such as in"]
    after = ["where the symbols have the meaning that they always have; see Equation 3.1 for this.", wide]
    return paragraph(72, 710, before) + between + text(NUMBER_X, 662, number) + paragraph(72, 630, after)


def test_equations_are_taken_only_when_asked_for(tmp_path):
    pdf = write_pdf(tmp_path / "a.pdf", [page()])
    without, _ = extract(pdf, tmp_path / "without")
    assert not of_kind(without, "equation")
    with_them, counts = extract(pdf, tmp_path / "with", DocumentLimits(equations=True))
    assert [record["number"] for record in of_kind(with_them, "equation")] == ["3.1"]
    assert counts["figures"] == {"input": 1, "kept": 1, "dropped": {}}
    # What is running text does not depend on the option.
    assert texts_of(with_them) == texts_of(without)


def test_an_equation_has_its_picture_its_characters_and_the_paragraphs_around(tmp_path):
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [page()]), tmp_path / "out", DocumentLimits(equations=True))
    (equation,) = of_kind(records, "equation")
    assert equation["inner_text"].split() == ["E", "=", "m", "c", "2", "+", "x"]
    assert "stand before" in equation["text"]
    assert "where the symbols" in equation["text"]
    assert len(equation["mentions"]) == 1
    assert equation["box"][1] >= 842 - 710 + 20
    assert equation["box"][3] <= 842 - 630 - 5
    picture = np.asarray(Image.open(tmp_path / "out" / equation["image"]).convert("L"))
    # The formula alone is 60 points wide: neither its number nor a line of text is in the picture.
    assert picture.shape[1] == pytest.approx(2 * 66, abs=16)
    assert picture.shape[0] < 2 * 22


def test_equations_of_neighbouring_rows_are_parted(tmp_path):
    rows = "".join(text(240, 670 - 16 * i, f"a = b + {i}") + text(482, 670 - 16 * i, f"({i + 1})") for i in range(3))
    content = paragraph(72, 760, BODY * 2) + rows + paragraph(72, 600, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [content]), tmp_path / "out", DocumentLimits(equations=True))
    assert [(record["number"], record["inner_text"]) for record in of_kind(records, "equation")] == [
        ("1", "a = b + 0"),
        ("2", "a = b + 1"),
        ("3", "a = b + 2"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        text(72, 662, "A sentence that ends with a number in parentheses at the end of its line, such as the"),
        plot(150, 600, 250, 70) + text(180, 586, "Figure 1: With a number beside it."),
        "",
    ],
    ids=["sentence", "figure", "nothing"],
)
def test_numbers_in_parentheses_without_a_formula_are_no_equations(tmp_path, other):
    content = paragraph(72, 760, BODY * 2) + other + text(NUMBER_X, 662, "(3.1)") + paragraph(72, 560, BODY)
    records, _ = extract(write_pdf(tmp_path / "a.pdf", [content]), tmp_path / "out", DocumentLimits(equations=True))
    assert not of_kind(records, "equation")
