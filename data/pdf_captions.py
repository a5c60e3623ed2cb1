"""Captions of a PDF's figures and tables: which lines are captions, in the style that most of the document's captions have.

The idea of voting on the document's style is that of pdffigures2 (Clark and Divvala, 2016); the code is our own.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from moexpand.data.pdf_labels import ALONE, BARE, CAPTION, label_of
from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_text import Box, Line, is_prose

ENTRY = re.compile(r"(?:\.\s?){4,}\s*\d+$")
"""How a line of a list of figures ends."""
CONTINUED = re.compile(r"\(?\b(?:continued|cont\.|cont['\u2019]?d)", re.I)
SENTENCE_END = re.compile(r"[.!?][)\]\"'\u201d\u2019]?$")
LEAST_SERIES = 3
"""Captions in a second style that make it one of the document's."""
MAX_CAPTION_LINES = 25


@dataclass
class Caption:
    """A caption and, once it is found, the region that it belongs to."""

    kind: str
    """figure or table."""
    number: str
    page: int
    lines: list[Line]
    box: Box
    region: Box | None = None

    @property
    def label(self) -> str:
        """The word before the number, without its end: fig, scheme or tab."""
        return label_of(self.lines[0].text)[0]


@dataclass(frozen=True)
class _Candidate:
    kind: str
    number: str
    style: tuple[str, bool, str]
    """Mark after the number, whether the word is in capitals, font of the line."""
    page: Page
    place: int


def union(boxes: list[Box]) -> Box:
    """Smallest box around all of them."""
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def find_captions(pages: list[Page], columns: dict[int, float | None], style: Style) -> list[Caption]:
    """All captions of the document; a number that comes back is one caption for each place that looks like its first.

    Args:
        pages: without running heads.
        columns: gutter of each page, by page number.
        style: fonts of the document.
    """
    candidates = [candidate for page in pages for candidate in _candidates(page, style)]
    captions: list[Caption] = []
    for kind in ("figure", "table"):
        own = [candidate for candidate in candidates if candidate.kind == kind]
        marks: dict[str, set[str]] = {}
        for candidate in own:
            marks.setdefault(candidate.style[0], set()).add(candidate.number)
        if not marks:
            continue
        usual = _usual_marks(marks)
        taken: set[tuple[str, str, str]] = set()
        pages_of: dict[str, int] = {}
        for candidate in own:
            line = candidate.page.lines[candidate.place]
            # Each part of a figure or table that goes on has a caption of its own.
            row = _row_text(candidate.page, line)
            # Such a caption says so, or is that of the page before once more.
            repeated = ALONE.match(row) is None and pages_of.get(row) == candidate.page.number - 1
            part = str(candidate.page.number) if repeated or CONTINUED.search(row) else ""
            pages_of[row] = candidate.page.number
            key = (label_of(line.text)[0], candidate.number, part)
            mark = candidate.style[0]
            if mark in usual and key not in taken:
                taken.add(key)
                lines = caption_lines(candidate.page, candidate.place, columns[candidate.page.number], style)
                if not mark and len(" ".join(one.text for one in lines)) < len(line.text) + 3 and BARE.search(line.text):
                    continue
                captions.append(Caption(kind, candidate.number, candidate.page.number, lines, union([one.box for one in lines])))
    return sorted(captions, key=lambda caption: (caption.page, caption.box[1], caption.box[0]))


def _usual_marks(marks: dict[str, set[str]]) -> set[str]:
    """The mark that most of the document's captions have after their numbers, and others that number a series of their own.

    Args:
        marks: the numbers that were found with each mark.
    """
    # A bare "Figure 3 shows" begins many sentences; it stands back where captions have marks.
    first = max(marks, key=lambda mark: (len(marks[mark]), mark != ""))
    if first == "" and len(marks) > 1:
        first = max((mark for mark in marks if mark), key=lambda mark: (len(marks[mark]), mark))
    # Papers that are bound with a manual keep their style.
    series = {mark for mark in marks if mark and len(marks[mark]) >= LEAST_SERIES and not marks[mark] & marks[first]}
    return {first} | series


def _candidates(page: Page, style: Style) -> list[_Candidate]:
    found = []
    for i, line in enumerate(page.lines):
        match = CAPTION.match(line.text)
        if match is None or line.turn or ENTRY.search(_row_text(page, line)):
            continue
        word, number, mark = match.groups()
        if _continues_text(page, line, bool(mark)):
            continue
        if not mark:
            # Without a mark it is a sentence, or a label in a drawing, unless a title follows.
            following = line.text[match.end() :].split()
            if following and (following[0][:1].islower() or (line.font in style.body_fonts and not following[0][:1].isupper())):
                continue
        if number.isalpha() and not number.isupper():
            continue
        kind = "table" if word.lower().startswith("tab") else "figure"
        found.append(_Candidate(kind, number, (mark, word.isupper(), line.font), page, i))
    return found


def _row_text(page: Page, line: Line) -> str:
    """Text of everything on the line's row."""
    row = [other for other in page.lines if abs(other.middle - line.middle) < 0.4 * line.size and other.x0 >= line.x0 - 1]
    return " ".join(other.text for other in sorted(row, key=lambda other: other.x0))


def _continues_text(page: Page, line: Line, marked: bool) -> bool:
    """The line before, close above and as wide, is running text: "see\nFigure 3." is no caption.

    A caption with a mark after its number may follow the end of a sentence without white between them.
    """
    for other in page.lines:
        step = line.y0 - other.y0
        if 0.5 * line.size < step < 1.35 * line.size and abs(other.size - line.size) < 0.3 and abs(other.x0 - line.x0) < 2:
            if marked and SENTENCE_END.search(other.text):
                return False
            return other.width > 0.3 * page.width and not other.mono and other.font == line.font
    return False


def caption_lines(page: Page, first: int, split: float | None, style: Style) -> list[Line]:
    """The caption's first line and all that go on with it, superscripts and pieces of formulas included."""
    head = page.lines[first]
    across = split is not None and head.x0 < split - 6 and head.x1 > split + 6
    reach = [
        line
        for line in page.lines
        if line is not head
        and not line.turn
        and head.y0 - 0.5 * head.size < line.y1
        and line.middle < head.y0 + 2 * MAX_CAPTION_LINES * head.size
        and (split is None or across or (line.x0 < split - 3) == (head.x0 < split - 3))
    ]
    rows = _rows([head, *reach])
    start = next(i for i, row in enumerate(rows) if any(line is head for line in row))
    row = _row_from(rows[start], head)
    taken = [row]
    pitch = None
    for following in rows[start + 1 : start + MAX_CAPTION_LINES]:
        if not _under(following, head, taken):
            # Labels of a figure, or another caption, that stand beside this one at heights of their own.
            continue
        pieces = _near(following, head, taken)
        if not pieces:
            break
        box, last = _extent(pieces, head), _extent(taken[-1], head)
        step = box[3] - last[3]
        if box[1] - last[3] > _white(taken, pieces, head, style) or (pitch is not None and step > 1.25 * pitch):
            break
        if not _goes_on(taken, pieces, head) or _parted(page, last, box):
            break
        if pitch is None and not (len(taken) == 1 and ALONE.match(head.text)):
            pitch = step
        taken.append(pieces)
    return [line for row in taken for line in row]


def _white(taken: list[list[Line]], row: list[Line], head: Line, style: Style) -> float:
    """White between two rows of a caption, at most, in points."""
    title = max(row, key=lambda line: len(line.text))
    if len(taken) > 1 or BARE.match(" ".join(line.text for line in taken[0])) is None or title.font in style.body_fonts:
        return 0.75 * head.size
    # A title in another font than the text, one empty line below its label.
    return 1.8 * head.size if len(row) == 1 and abs(title.x0 - head.x0) < 1 else 0.75 * head.size


def _rows(lines: list[Line]) -> list[list[Line]]:
    """Lines grouped by baseline from top to bottom, each row from left to right; small pieces join the row they touch."""
    size = max((line.size for line in lines), default=0.0)
    whole = sorted((line for line in lines if line.size > 0.75 * size or len(line.text) > 12), key=lambda line: line.middle)
    rows: list[list[Line]] = []
    for line in whole:
        if rows and abs(line.middle - rows[-1][0].middle) < 0.45 * max(line.size, rows[-1][0].size):
            rows[-1].append(line)
        else:
            rows.append([line])
    main = {id(line) for line in whole}
    for line in lines:
        if id(line) in main:
            continue
        # Signs of sums reach over several rows and belong to the one whose middle is theirs.
        touched = [
            (abs(line.middle - row[0].middle), i)
            for i, row in enumerate(rows)
            if min(line.y1, row[0].y1) - max(line.y0, row[0].y0) > 0.2 * (line.y1 - line.y0)
        ]
        if not touched:
            rows.append([line])
        elif min(touched)[0] < 0.8 * size:
            rows[min(touched)[1]].append(line)
    for row in rows:
        row.sort(key=lambda line: line.x0)
    return sorted(rows, key=lambda row: max(row, key=lambda line: line.size).middle)


def _row_from(row: list[Line], head: Line) -> list[Line]:
    """The pieces of the first row that belong to the caption: what stands right of the label without a wide gap."""
    taken = [head]
    for line in row:
        if line is head or line.x0 < head.x0:
            continue
        gap = line.x0 - max(other.x1 for other in taken)
        label = CAPTION.match(head.text)
        alone = len(taken) == 1 and label is not None and label.end() == len(head.text)
        if gap > (4.0 if alone else 1.9) * head.size or CAPTION.match(line.text) or _of_text_beside(line, head):
            break
        taken.append(line)
    return taken


def _of_text_beside(line: Line, head: Line) -> bool:
    """A longer piece on a baseline or in a size of its own: running text that flows around the figure."""
    return len(line.text) > 20 and (abs(line.y1 - head.y1) > 0.15 * head.size or abs(line.size - head.size) > 0.6)


def _under(row: list[Line], head: Line, taken: list[list[Line]]) -> list[Line]:
    """The pieces of a row between the left and the right end of what the caption has so far."""
    x0 = min(line.x0 for row in taken for line in row)
    x1 = max(line.x1 for row in taken for line in row)
    return [line for line in row if line.x1 > x0 - 0.5 * head.size and line.x0 < x1 + 0.5 * head.size]


def _near(row: list[Line], head: Line, taken: list[list[Line]]) -> list[Line]:
    """The pieces of a later row under the caption, up to the first wide gap."""
    under = _under(row, head, taken)
    runs = [[under[0]]]
    for last, line in pairwise(under):
        if line.x0 - last.x1 > 1.9 * head.size:
            runs.append([])
        runs[-1].append(line)
    if len(runs) > 1 and not any(CAPTION.match(run[0].text) for run in runs):
        # A row of cells.
        return []
    return runs[0]


def _extent(row: list[Line], head: Line) -> Box:
    """Box of a row's pieces in the caption's size; superscripts and large signs do not count."""
    usual = [line.box for line in row if line.size > 0.8 * head.size] or [line.box for line in row]
    box = union([line.box for line in row])
    y1 = sorted(b[3] for b in usual)[len(usual) // 2]
    y0 = sorted(b[1] for b in usual)[len(usual) // 2]
    return (box[0], y0, box[2], y1)


def _goes_on(taken: list[list[Line]], row: list[Line], head: Line) -> bool:
    """Whether a row is the caption's next one, by font, place and fill of the last row."""
    main = max(row, key=lambda line: len(line.text))
    last = taken[-1]
    size = max(last, key=lambda line: len(line.text)).size
    alone = len(taken) == 1 and ALONE.match(" ".join(line.text for line in last)) is not None
    # A title in small capitals has the size of these; it is smaller than its label, and so are its other rows.
    other_size = not (alone and main.size < head.size) and min(abs(main.size - head.size), abs(main.size - size)) > 0.6
    # The first label of a figure that begins right below, in a font of its own.
    foreign = len(main.text) < 20 and main.font not in {line.font for one in taken for line in one}
    if CAPTION.match(row[0].text) or other_size or (foreign and not alone):
        return False
    if main.mono and not head.mono and len(row) == 1 and _extent(row, head)[1] - _extent(last, head)[3] > 0.45 * head.size:
        # A listing; code within a caption stands at the caption's pitch.
        return False
    x0, x1 = last[0].x0, max(line.x1 for line in last)
    right = max([line.x1 for line in row] + [line.x1 for other in taken for line in other])
    left = min(line.x0 for other in taken for line in other)
    centred = abs((row[0].x0 + row[-1].x1) / 2 - (x0 + x1) / 2) < 1.5 * head.size
    if row[0].x0 < left - 1.5 * head.size and not centred:
        return False
    if row[0].x0 > left + 12 * head.size and not centred:
        return False
    if alone:
        return len(row) == 1 or is_prose(" ".join(line.text for line in row))
    # The next word would have fitted on the last row: that was the paragraph's end.
    word = row[0].text.split(" ", 1)[0]
    length = row[0].width * len(word) / max(len(row[0].text), 1)
    room = right - x1
    if centred and x0 > row[0].x0 + head.size:
        room *= 2
    return room < length + 1.2 * head.size


def _parted(page: Page, above: Box, below: Box) -> bool:
    """Something is drawn between two rows: a rule, the frame of a table."""
    for x0, y0, x1, y1 in page.graphics:
        if x1 - x0 > 12 and min(x1, below[2]) - max(x0, below[0]) > 6:
            middle_above, middle_below = (above[1] + above[3]) / 2, (below[1] + below[3]) / 2
            edges = (y0, y1) if y1 - y0 > 3 else ((y0 + y1) / 2,)
            if any(middle_above < y < middle_below for y in edges):
                return True
    return False
