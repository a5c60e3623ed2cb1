"""Makes the files of this folder with docling-core (MIT), which the tests do not need; `docling_core` 2.104.0 made those in git.

    python tests/data/docling_example/make.py

referenced.json has its pictures in referenced_artifacts/, embedded.json inside; both are what docling's `--to json` writes with
`--image-export-mode referenced` and `embedded`. The text is our own.
"""

import os
from pathlib import Path
from typing import Any

from docling_core.types.doc import (  # type: ignore[import-not-found]
    BoundingBox,
    ContentLayer,
    CoordOrigin,
    DocItemLabel,
    DoclingDocument,
    ImageRef,
    ImageRefMode,
    ProvenanceItem,
    Size,
    TableCell,
    TableData,
)
from PIL import Image, ImageDraw

HEIGHT = 792.0
SENTENCES = "The measured curve rises for a while and then falls, and nobody who looked at it found another reason for that. "


def place(page: int, x0: float, y0: float, x1: float, y1: float) -> Any:
    """Provenance of a box that is given from the top left of the page; written from the bottom left, as docling does."""
    box = BoundingBox(l=x0, t=HEIGHT - y0, r=x1, b=HEIGHT - y1, coord_origin=CoordOrigin.BOTTOMLEFT)
    return ProvenanceItem(page_no=page, bbox=box, charspan=(0, 1))


def page_picture(number: int) -> Image.Image:
    """A page at 36 dots per inch with a black frame where the table or the formula lies."""
    image = Image.new("RGB", (306, 396), "white")
    ImageDraw.Draw(image).rectangle((50, 100, 200, 150) if number == 2 else (50, 200, 200, 220), outline="black", width=4)
    return image


def zigzag() -> Image.Image:
    """The figure."""
    image = Image.new("RGB", (120, 80), "white")
    ImageDraw.Draw(image).line([(10 * i, 70 if i % 2 else 10) for i in range(1, 12)], fill="blue", width=3)
    return image


def document() -> Any:
    """Three pages: text, a list, a figure and a table with captions, a formula, a picture without one, a running head."""
    doc = DoclingDocument(name="example")
    for number in (1, 2, 3):
        size = Size(width=612.0, height=HEIGHT)
        doc.add_page(number, size, ImageRef.from_pil(page_picture(number), dpi=36) if number > 1 else None)
    head = doc.add_text(DocItemLabel.PAGE_HEADER, "Running head of the example", prov=place(1, 72, 20, 300, 30))
    head.content_layer = ContentLayer.FURNITURE
    doc.add_title("An example document", prov=place(1, 72, 60, 300, 80))
    doc.add_text(DocItemLabel.TEXT, SENTENCES * 2 + "It is drawn in Figure 1.", prov=place(1, 72, 100, 540, 160))
    items = doc.add_list_group()
    doc.add_list_item("The first point of a list.", parent=items, prov=place(1, 72, 170, 300, 180))
    doc.add_list_item("The second point.", parent=items, prov=place(1, 72, 185, 300, 195))
    inner = doc.add_list_group(parent=items)
    doc.add_list_item("A point below it.", parent=inner, enumerated=True, marker="1.", prov=place(1, 90, 200, 300, 210))
    caption = doc.add_text(DocItemLabel.CAPTION, "Figure 1: A zigzag in blue.", prov=place(1, 72, 420, 300, 430))
    picture = doc.add_picture(image=ImageRef.from_pil(zigzag(), dpi=72), caption=caption, prov=place(1, 100, 300, 220, 380))
    doc.add_text(DocItemLabel.TEXT, "time in seconds", prov=place(1, 120, 370, 180, 380), parent=picture)
    doc.add_heading("Results", prov=place(2, 72, 60, 300, 80))
    doc.add_text(DocItemLabel.TEXT, SENTENCES + "As Table 1 shows, both are close to 0.5.", prov=place(2, 72, 100, 540, 160))
    words = [["sample", "value"], ["first", "0.48"], ["second", "0.52"]]
    cells = [
        TableCell(
            text=words[i][j],
            start_row_offset_idx=i,
            end_row_offset_idx=i + 1,
            start_col_offset_idx=j,
            end_col_offset_idx=j + 1,
        )
        for i in range(3)
        for j in range(2)
    ]
    above = doc.add_text(DocItemLabel.CAPTION, "Table 1. Values of both samples.", prov=place(2, 72, 180, 300, 190))
    table = TableData(table_cells=cells, num_rows=3, num_cols=2)
    doc.add_table(table, caption=above, prov=place(2, 100, 200, 400, 300))
    line = doc.add_inline_group()
    doc.add_text(DocItemLabel.TEXT, "Here words stand", parent=line, prov=place(2, 72, 320, 150, 330))
    doc.add_text(DocItemLabel.TEXT, "in several pieces.", parent=line, prov=place(2, 150, 320, 300, 330))
    doc.add_text(DocItemLabel.TEXT, SENTENCES + "The mean follows from Equation (1).", prov=place(3, 72, 300, 540, 360))
    doc.add_text(DocItemLabel.FORMULA, r"m = \frac{a + b}{2} \tag{1}", prov=place(3, 100, 400, 400, 440))
    doc.add_text(DocItemLabel.TEXT, SENTENCES + "Here the example ends.", prov=place(3, 72, 460, 540, 500))
    doc.add_picture(prov=place(3, 100, 600, 200, 700))
    return doc


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    document().save_as_json(Path("referenced.json"), image_mode=ImageRefMode.REFERENCED)
    document().save_as_json(Path("embedded.json"), image_mode=ImageRefMode.EMBEDDED)
