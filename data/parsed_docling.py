"""Output of docling to records: a DoclingDocument as JSON, with its pictures inside or beside it.

The document is a tree of references from `body` ("#/texts/3") into the lists `texts`, `groups`, `tables` and `pictures`. Only the
layer `body` is read: running heads, notes and what is hidden lie in others. A figure is shown by its own picture, or cut out of
the picture of its page where the document holds one. docs/data.md says which versions were looked up.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moexpand.data.document import DocumentLimits, Refused
from moexpand.data.parsed import (
    Box,
    Figure,
    Paragraph,
    Parsed,
    Picture,
    clean,
    extract_parsed,
    load_json,
    numbers,
    split_caption,
    tag_of,
)

SCHEMA = "DoclingDocument"
LISTS = ("texts", "groups", "tables", "pictures", "key_value_items", "form_items", "field_regions", "field_items")
LEFT_OUT = ("page_header", "page_footer")
MAX_PAGE = 1_000_000
_REFERENCE = re.compile(r"#/(\w+)/(\d{1,9})")


def extract_docling(path: str, folder: str, limits: DocumentLimits) -> None:
    """Extract one DoclingDocument into a folder; see `parsed.extract_parsed`."""
    extract_parsed(path, folder, limits, read_docling)


def read_docling(path: Path) -> Parsed:
    """A DoclingDocument in reading order.

    Raises:
        Refused: `too_large`, `not_json`, or `wrong_structure` where it is not built as docling builds it.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get("schema_name") != SCHEMA or not isinstance(content.get("body"), dict):
        raise Refused("wrong_structure")
    return _Document(content).read()


class _Document:
    """One document while it is read; every item is visited once, so that circles of references end."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._body = content["body"]
        self._lists: dict[str, list[Any]] = {}
        for name in LISTS:
            items = content.get(name) or []
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise Refused("wrong_structure")
            self._lists[name] = items
        pages = content.get("pages") or {}
        if not isinstance(pages, dict) or not all(isinstance(page, dict) for page in pages.values()):
            raise Refused("wrong_structure")
        self._pages = {int(key): page for key, page in pages.items() if re.fullmatch(r"[1-9]\d{0,5}", key)}
        self._visited: set[tuple[str, int]] = set()
        self._parsed = Parsed(pages=set(self._pages))
        self._list_place = -1
        """Of the paragraph that the next item of a list joins, where nothing stands between them."""

    def read(self) -> Parsed:
        """Walk the tree, depth first, without recursion."""
        # Captions and notes may stand anywhere in the tree: they belong to their figures.
        for item in (*self._lists["tables"], *self._lists["pictures"]):
            self._visited.update(self._places(item, "captions"), self._places(item, "footnotes"))
        stack = [iter(self._places(self._body, "children"))]
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
            elif place not in self._visited:
                self._visited.add(place)
                item = self._item(place)
                if self._add(place[0], item):
                    stack.append(iter(self._places(item, "children")))
        return self._parsed

    def _add(self, kind: str, item: dict[str, Any]) -> bool:
        """Add what an item of one of the lists gives; says whether its children are to be read as well."""
        label, page = item.get("label"), self._page(item)
        if item.get("content_layer", "body") != "body" or label in LEFT_OUT:
            return False
        if kind == "groups":
            if label != "inline":
                return True
            # Pieces of one paragraph: words in another type, formulas in a line.
            self._parsed.add_text(" ".join(self._inner_texts(item)), self._page_inside(item))
            return False
        if kind in ("pictures", "tables"):
            self._add_figure(kind, item, page)
        if kind != "texts":
            return True
        text = self._text(item)
        if label == "formula":
            self._parsed.add_text(text, page)
            picture, box = self._shown(item, page)
            self._parsed.items.append(Figure("equation", page, box, picture, inner=text, number=tag_of(text)))
        elif label == "list_item" and text:
            self._add_list_item(item, text, page)
        else:
            self._parsed.add_text(text, page)
        return True

    def _add_list_item(self, item: dict[str, Any], text: str, page: int | None) -> None:
        """Items that follow one another are one paragraph."""
        marker = item.get("marker")
        line = f"{clean(marker) if isinstance(marker, str) and clean(marker) else '-'} {text}"
        items = self._parsed.items
        if items and self._list_place == len(items) - 1 and isinstance(last := items[-1], Paragraph):
            last.text += f"\n{line}"
        else:
            self._parsed.add_text(line, page)
        self._list_place = len(items) - 1

    def _add_figure(self, kind: str, item: dict[str, Any], page: int | None) -> None:
        captions, notes = (
            [text for place in self._places(item, key) if (text := self._text(self._item(place)))]
            for key in ("captions", "footnotes")
        )
        caption, before = split_caption(captions)
        inner = " ".join(self._inner_texts(item))
        if kind == "tables":
            inner = _table_text(item.get("data"))  # its cells say the same
        if item.get("label") == "document_index":
            self._parsed.add_text(inner, page)  # a table of contents is no table of the document
            return
        picture, box = self._shown(item, page)
        name = "table" if kind == "tables" else "figure"
        self._parsed.items.append(Figure(name, page, box, picture, caption, " ".join([*before, *notes]), inner))

    def _inner_texts(self, item: dict[str, Any]) -> Iterator[str]:
        """Texts below an item, in order; they are not read again. Pictures and tables below it are left to be read."""
        stack = [iter(self._places(item, "children"))]
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
            elif place not in self._visited and place[0] not in ("pictures", "tables"):
                self._visited.add(place)
                found = self._item(place)
                if found.get("content_layer", "body") == "body":
                    if place[0] == "texts" and (text := self._text(found)):
                        yield text
                    stack.append(iter(self._places(found, "children")))

    def _text(self, item: dict[str, Any]) -> str:
        """A formula that was decoded is set in dollar signs; `orig` is what the PDF says where it was not."""
        text, original = (clean(value) if isinstance(value := item.get(key), str) else "" for key in ("text", "orig"))
        if item.get("label") != "formula" or not text:
            return text or original
        return f"$${text}$$"

    def _places(self, item: dict[str, Any], key: str) -> list[tuple[str, int]]:
        """What the references under a key name.

        Raises:
            Refused: `wrong_structure`: they are no references, or name nothing.
        """
        references = item.get(key) or []
        places = []
        for reference in references if isinstance(references, list) else [None]:
            target = reference.get("$ref") if isinstance(reference, dict) else None
            match = _REFERENCE.fullmatch(target) if isinstance(target, str) else None
            if match is None or int(match[2]) >= len(self._lists.get(match[1], [])):
                raise Refused("wrong_structure")
            places.append((match[1], int(match[2])))
        return places

    def _item(self, place: tuple[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = self._lists[place[0]][place[1]]
        return found

    def _page_inside(self, item: dict[str, Any]) -> int | None:
        """Of an item's first child."""
        places = self._places(item, "children")
        return self._page(self._item(places[0])) if places else None

    def _page(self, item: dict[str, Any]) -> int | None:
        number = _first(item.get("prov")).get("page_no")
        return number if type(number) is int and 1 <= number < MAX_PAGE else None

    def _shown(self, item: dict[str, Any], page: int | None) -> tuple[Picture | None, Box | None]:
        """The picture of an item, and its box in points from the top left of its page."""
        entry = self._pages.get(page or 0, {})
        size = entry.get("size")
        sides = numbers([size.get("width"), size.get("height")], 2) if isinstance(size, dict) else None
        box = _box(_first(item.get("prov")).get("bbox"), sides[1]) if sides and min(sides) > 0 else None
        if uri := _uri(item):
            return Picture(uri), box
        if sides and box and (uri := _uri(entry)):
            return Picture(uri, (box[0] / sides[0], box[1] / sides[1], box[2] / sides[0], box[3] / sides[1])), box
        return None, box


def _first(values: Any) -> dict[str, Any]:
    return values[0] if isinstance(values, list) and values and isinstance(values[0], dict) else {}


def _uri(item: dict[str, Any]) -> str:
    image = item.get("image")
    uri = image.get("uri") if isinstance(image, dict) else None
    return uri if isinstance(uri, str) else ""


def _box(value: Any, height: float) -> Box | None:
    """(x0, y0, x1, y1) from the top left of a page of this height."""
    if not isinstance(value, dict):
        return None
    sides = numbers([value.get(side) for side in "ltrb"], 4)
    if sides is None:
        return None
    left, top, right, bottom = sides
    if value.get("coord_origin") == "BOTTOMLEFT":
        top, bottom = height - top, height - bottom
    return (left, top, right, bottom) if left < right and top < bottom else None


def _table_text(data: Any) -> str:
    """A line for each row, a bar between cells; a cell over several rows or columns stands once."""
    cells = data.get("table_cells") if isinstance(data, dict) else None
    rows: dict[int, list[tuple[int, str]]] = {}
    for cell in cells if isinstance(cells, list) else []:
        if not isinstance(cell, dict) or not isinstance(text := cell.get("text"), str):
            raise Refused("wrong_structure")
        row, column = cell.get("start_row_offset_idx"), cell.get("start_col_offset_idx")
        if type(row) is not int or type(column) is not int:
            raise Refused("wrong_structure")
        rows.setdefault(row, []).append((column, " ".join(text.split())))
    return clean("\n".join(" | ".join(text for _, text in sorted(rows[row])) for row in sorted(rows)))
