"""Output of MinerU to records: `NAME_content_list.json` with its `images/`, and page sizes from `NAME_middle.json`.

A content list is a list of blocks in reading order: {"type", "page_idx" from 0, "bbox" in thousandths of the page} with "text",
"list_items" or "code_body", or with "img_path" and the captions of an image, chart, table or equation. `_content_list_v2.json`,
a list of pages with blocks {"type", "content"}, is read where the other is missing. docs/data.md says which versions were
looked up.
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from moexpand.data.document import DocumentLimits, Refused
from moexpand.data.parsed import Box, Figure, Parsed, Picture, clean, extract_parsed, load_json, numbers, split_caption, tag_of

LEFT_OUT = ("header", "footer", "page_number", "aside_text", "page_footnote", "discarded")
"""Types of blocks that MinerU keeps out of its own running text."""
FIGURES = {"image": "figure", "chart": "figure", "table": "table", "equation": "equation"}
MAX_PAGE = 1_000_000


def extract_mineru(path: str, folder: str, limits: DocumentLimits) -> None:
    """Extract one content list into a folder; see `parsed.extract_parsed`."""
    extract_parsed(path, folder, limits, read_mineru)


def read_mineru(path: Path) -> Parsed:
    """A content list in reading order.

    Raises:
        Refused: `too_large`, `not_json`, or `wrong_structure` where it is not a list of blocks as MinerU writes them.
    """
    content = load_json(path)
    if not isinstance(content, list):
        raise Refused("wrong_structure")
    if path.name.endswith("_v2.json"):
        content = _first_form(content)
    sizes = _page_sizes(path.with_name(re.sub(r"content_list(_v2)?\.json$", "middle.json", path.name)))
    parsed = Parsed(pages=set(sizes))
    for block in content:
        if not isinstance(block, dict):
            raise Refused("wrong_structure")
        kind = block.get("type")
        if kind is None:
            continue  # written for types that MinerU's writer does not know itself
        index = block.get("page_idx")
        if not isinstance(kind, str) or type(index) is not int or not 0 <= index < MAX_PAGE:
            raise Refused("wrong_structure")
        parsed.pages.add(index + 1)
        _add(parsed, kind, block, index + 1, sizes.get(index + 1))
    return parsed


def _add(parsed: Parsed, kind: str, block: dict[str, Any], page: int, size: tuple[float, float] | None) -> None:
    """Add what a block gives."""
    if kind in FIGURES:
        if kind == "equation":
            parsed.add_text(_text(block.get("text")), page)
        parsed.items.append(_figure(kind, block, page, size))
    elif kind == "list":
        parsed.add_text("\n".join(_texts(block.get("list_items"))), page)
    elif kind == "code":
        pieces = [*_texts(block.get("code_caption")), _text(block.get("code_body")), *_texts(block.get("code_footnote"))]
        parsed.add_text("\n".join(piece for piece in pieces if piece), page)
    elif kind not in LEFT_OUT:
        parsed.add_text(_text(block.get("text")), page)


def _figure(kind: str, block: dict[str, Any], page: int, size: tuple[float, float] | None) -> Figure:
    path = block.get("img_path")
    html = _text(block.get("table_body"))
    text = _text(block.get("text"))
    # Versions up to 2.0 say img_caption and img_footnote.
    captions, notes = ([_texts(block.get(f"{word}_{end}")) for word in (kind, "img")] for end in ("caption", "footnote"))
    caption, before = split_caption(captions[0] or captions[1])
    return Figure(
        FIGURES[kind],
        page,
        _box(block.get("bbox"), size),
        # Where a block has no picture, some versions write the folder alone.
        Picture(path) if isinstance(path, str) and not path.endswith("/") else None,
        caption=caption,
        notes=" ".join([*before, *(notes[0] or notes[1])]),
        inner={"table": _cells(html), "equation": text}.get(kind, _text(block.get("content"))),
        number=tag_of(text) if kind == "equation" else "",
        html=html if "<" in html else "",
    )


def _box(values: Any, size: tuple[float, float] | None) -> Box | None:
    """Points from the top left, of thousandths of the page; None where the page's size is not known."""
    thousandths = numbers(values, 4)
    if thousandths is None or size is None:
        return None
    x0, y0, x1, y1 = (min(max(value, 0.0), 1000.0) / 1000 for value in thousandths)
    if x0 >= x1 or y0 >= y1:
        return None
    return (x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1])


def _page_sizes(middle: Path) -> dict[int, tuple[float, float]]:
    """Page number from 1 -> width and height in points; nothing where the file is missing or not as it should be."""
    if not middle.is_file() or not middle.resolve().is_relative_to(middle.parent.resolve()):
        return {}
    try:
        content = load_json(middle)
    except Refused:
        return {}
    pages = content.get("pdf_info") if isinstance(content, dict) else None
    sizes = {}
    for page in pages if isinstance(pages, list) else []:
        index = page.get("page_idx") if isinstance(page, dict) else None
        if type(index) is int and 0 <= index < MAX_PAGE:
            size = numbers(page.get("page_size"), 2)
            if size is not None and min(size) > 0:
                sizes[index + 1] = (size[0], size[1])
    return sizes


def _text(value: Any) -> str:
    return clean(value) if isinstance(value, str) else ""


def _texts(value: Any) -> list[str]:
    """The texts of a list of strings, or of one string."""
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values) if text]


class _Cells(HTMLParser):
    """Text of a table: a line for each row, a bar between cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = [[]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if not self.rows[-1]:
            self.rows[-1].append("")
        self.rows[-1][-1] += data


def _cells(html: str) -> str:
    if "<" not in html:
        return html
    parser = _Cells()
    parser.feed(html)
    parser.close()
    rows = (" | ".join(" ".join(cell.split()) for cell in row) for row in parser.rows)
    return clean("\n".join(row for row in rows if row.strip(" |")))


def _first_form(pages: list[Any]) -> Iterator[dict[str, Any]]:
    """Blocks of the second form of content lists as those of the first.

    Raises:
        Refused: `wrong_structure`.
    """
    for index, blocks in enumerate(pages):
        if not isinstance(blocks, list):
            raise Refused("wrong_structure")
        for block in blocks:
            content = block.get("content", {}) if isinstance(block, dict) else None
            if not isinstance(content, dict):
                raise Refused("wrong_structure")
            if (kind := block.get("type")) is not None:
                if not isinstance(kind, str):
                    raise Refused("wrong_structure")
                yield {"page_idx": index, "bbox": block.get("bbox")} | _first_fields(kind, content)


def _first_fields(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    source = content.get("image_source")
    path = source.get("path") if isinstance(source, dict) else None
    if kind in ("image", "chart", "table"):
        captions = {f"{kind}_{end}": [_spans(content.get(f"{kind}_{end}"))] for end in ("caption", "footnote")}
        inside = {"table_body": content.get("html"), "content": content.get("content")}
        return {"type": kind, "img_path": path} | captions | inside
    if kind == "equation_interline":
        formula = _text(content.get("math_content"))
        return {"type": "equation", "img_path": path, "text": f"$$\n{formula}\n$$" if formula else ""}
    if kind in ("code", "algorithm"):
        fields = {f"code_{end}": [_spans(content.get(f"{kind}_{end}"))] for end in ("caption", "footnote")}
        return {"type": "code", "code_body": _spans(content.get(f"{kind}_content"))} | fields
    if kind in ("list", "index"):
        items = content.get("list_items")
        found = (
            [item.get("item_content") if isinstance(item, dict) else item for item in items] if isinstance(items, list) else []
        )
        return {"type": "list", "list_items": [_spans(item) for item in found]}
    if kind.startswith("page_"):
        return {"type": "header"}
    return {"type": "text", "text": _spans(content.get(f"{kind}_content"))}


def _spans(value: Any) -> str:
    """Text of a list of spans; a formula within a line is set between dollar signs."""
    if not isinstance(value, list):
        return _text(value)
    pieces = []
    for span in value:
        text = _text(span.get("content")) if isinstance(span, dict) else _text(span)
        if text:
            pieces.append(f"${text}$" if isinstance(span, dict) and span.get("type") == "equation_inline" else text)
    return " ".join(pieces)
