"""Output of MinerU as its documentation and the code that writes it have it, and changed copies of an example of docling's own.

`docling_example/` was written by docling-core itself; its make.py says how.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from moexpand.data.document import COUNTS, RECORDS, DocumentLimits
from moexpand.data.parsed_docling import extract_docling
from moexpand.data.parsed_mineru import extract_mineru
from tests.data.pdf_maker import paragraph, write_pdf

EXAMPLE = Path(__file__).parent / "docling_example"

LONG = "The measured curve rises for a while and then falls, and nobody who looked at it found another reason for that. "

EVERYTHING = DocumentLimits(equations=True)


def picture(form: str = "JPEG", side: int = 120) -> bytes:
    image = Image.new("RGB", (side, 80), "white")
    ImageDraw.Draw(image).line([(10 * i, 70 if i % 2 else 10) for i in range(1, 12)], fill="blue", width=3)
    written = io.BytesIO()
    image.save(written, form)
    return written.getvalue()


BLOCKS: list[dict[str, Any]] = [
    {"type": "header", "text": "Running head", "bbox": [100, 20, 400, 30], "page_idx": 0},
    {"type": "text", "text": "An example ", "text_level": 1, "bbox": [100, 50, 500, 70], "page_idx": 0},
    {"type": "text", "text": f"{LONG}It is drawn in Fig. 1. ", "bbox": [100, 100, 900, 200], "page_idx": 0},
    {
        "type": "image",
        "img_path": "images/a.jpg",
        "image_caption": ["(a)", "Figure 1: A zigzag ", "in blue. "],
        "image_footnote": ["Drawn by hand."],
        "bbox": [200, 300, 600, 500],
        "page_idx": 0,
    },
    {"page_idx": 0},
    {"type": "list", "sub_type": "text", "list_items": ["- one point", "- another"], "bbox": [1, 2, 3, 4], "page_idx": 0},
    {"type": "text", "text": f"{LONG}Table 2 and Eq. (3) say more.", "bbox": [100, 100, 900, 200], "page_idx": 1},
    {
        "type": "table",
        "img_path": "images/b.jpg",
        "table_caption": ["Table 2. Values."],
        "table_footnote": [],
        "table_body": "<table><tr><td colspan=2>both</td></tr><tr><td>x &lt; 1</td><td>0.5</td></tr></table>",
        "bbox": [200, 300, 600, 500],
        "page_idx": 1,
    },
    {
        "type": "equation",
        "img_path": "images/c.jpg",
        "text": "$$\ny = x \\tag{3}\n$$",
        "text_format": "latex",
        "bbox": [200, 550, 600, 600],
        "page_idx": 1,
    },
    {"type": "code", "sub_type": "code", "code_caption": ["Listing 1"], "code_body": "print(1)", "page_idx": 1},
    {"type": "chart", "img_path": "images/d.jpg", "content": "| a | 7 |", "chart_caption": ["Figure 2: Bars."], "page_idx": 1},
    {"type": "image", "img_path": "images/e.jpg", "image_caption": [], "bbox": [1, 1, 500, 500], "page_idx": 1},
    {"type": "page_number", "text": "2", "page_idx": 1},
    {"type": "discarded", "text": "Margin", "page_idx": 1},
]


def mineru(folder: Path, blocks: Any = BLOCKS, name: str = "paper", middle: bool = True) -> Path:
    """The folder that MinerU writes for one document; returns its content list."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for letter, side in zip("abcde", (120, 121, 122, 123, 124), strict=True):
        (folder / "images" / f"{letter}.jpg").write_bytes(picture(side=side))
    for part in ("layout", "span", "origin"):
        write_pdf(folder / f"{name}_{part}.pdf", [paragraph(72, 700, [LONG] * 9)])
    (folder / f"{name}.md").write_text(LONG * 9)
    for part in ("model", "content_list_v2"):
        (folder / f"{name}_{part}.json").write_text("[]")
    if middle:
        pages = [{"page_idx": i, "page_size": [600, 800], "para_blocks": []} for i in range(3)]
        (folder / f"{name}_middle.json").write_text(json.dumps({"pdf_info": pages, "_backend": "pipeline"}))
    path = folder / f"{name}_content_list.json"
    path.write_text(blocks if isinstance(blocks, str) else json.dumps(blocks))
    return path


def read(path: Path, out: Path, limits: DocumentLimits = EVERYTHING) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records and counts of a parsed document."""
    out.mkdir()
    extract = extract_mineru if "content_list" in path.name else extract_docling
    extract(str(path), str(out), limits)
    records = [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    counts = json.loads((out / COUNTS).read_text())
    for stage in ("pages", "figures"):
        assert counts[stage]["input"] == counts[stage]["kept"] + sum(counts[stage]["dropped"].values())
    return records, counts


def docling(change: Any, folder: Path, name: str = "referenced") -> Path:
    """A copy of the example, changed."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    content = json.loads((folder / f"{name}.json").read_text())
    content = change(content) or content
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"
