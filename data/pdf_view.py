"""One page as the search for figures sees it: drawings, rules, frames, and which lines are walls that no figure crosses."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moexpand.data.pdf_captions import Caption, union
from moexpand.data.pdf_layout import Page, Style
from moexpand.data.pdf_shapes import RULE, Boxes, bridge_titles, cluster, framed_by_lines, inside, join_rules
from moexpand.data.pdf_text import Box, Line, is_prose

NUMBER = re.compile(r"^[(\-\u2212+]?[\d.,]+[%)]?$")
LAST_WORD = re.compile(r"^[^\W\d_]{3,}[.!?]$")
LEAST_FLOWING = 4
"""Lines from one left edge to the margin that are running text wherever they begin."""


@dataclass
class PageView:
    """A page with captions, prepared."""

    page: Page
    style: Style
    split: float | None
    captions: list[Caption]
    lines: list[Line] = field(default_factory=list)
    """All but those of captions."""
    boxes: Boxes = field(default_factory=lambda: np.empty((0, 4)))
    """Drawings, [G, 4], without backgrounds of the page."""
    rules: list[Box] = field(default_factory=list)
    """Horizontal rules, pieces on one height joined, from top to bottom."""
    clusters: list[Box] = field(default_factory=list)
    """Boxes around drawings that touch."""
    frames: list[Box] = field(default_factory=list)
    """Frames and shades with nothing but text in them."""
    walls: list[Line] = field(default_factory=list)
    """Running text, listings and headings."""
    texts: list[Box] = field(default_factory=list)
    """Boxes of paragraphs that stand outside of drawings, of three lines or more."""
    taken: list[Box] = field(default_factory=list)
    """Regions that are known to be other captions' own."""

    def __post_init__(self) -> None:
        page = self.page
        taken = {id(line) for caption in self.captions for line in caption.lines}
        self.lines = [line for line in page.lines if id(line) not in taken]
        boxes = np.array(page.graphics, np.float64).reshape(-1, 4)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        boxes = boxes[(area < 0.8 * page.width * page.height) & ~self._is_bleed(boxes)]
        self.boxes = boxes[~self._holds_caption(boxes)]
        self.rules = bridge_titles(join_rules(self.boxes), self.lines)
        self.clusters = cluster(self.boxes)
        paragraphs = _paragraph_lines([line for line in self.lines if self._is_wide(line)])
        paragraphs |= _flowing_lines([line for line in self.lines if self._is_set_to_margin(line)])
        body = [line for line in self.lines if id(line) in paragraphs or self._is_body(line)]
        body += self._last_lines(body)
        self.frames = self._text_frames()
        body += self._framed_code(body)
        self.texts = self._texts()
        beside = self._code_beside_drawings()
        self.walls = [line for line in body if id(line) not in beside and not self._is_label(line, body)] + self._footnotes()

    def _is_bleed(self, boxes: Boxes) -> NDArray[np.bool_]:
        """Which boxes are bars along the upper or lower edge of the page."""
        page = self.page
        wide = (boxes[:, 0] < 2) & (boxes[:, 2] > page.width - 2) & (boxes[:, 3] - boxes[:, 1] < 0.25 * page.height)
        at_edge = (boxes[:, 1] < 0.15 * page.height) | (boxes[:, 3] > 0.85 * page.height)
        found: NDArray[np.bool_] = wide & at_edge
        return found

    def _holds_caption(self, boxes: Boxes) -> NDArray[np.bool_]:
        """Which boxes are frames or grounds around a figure and its caption, or the sides of such a frame."""
        found = np.zeros(len(boxes), bool)
        high = boxes[:, 3] - boxes[:, 1] > RULE
        for caption in self.captions:
            x0, y0, x1, y1 = caption.box
            around = (boxes[:, 0] < x0) & (boxes[:, 1] < y0) & (boxes[:, 2] > x1) & (boxes[:, 3] > y1)
            found |= around
            for frame in boxes[around].tolist():
                sides = ((np.abs(boxes[:, :2] - frame[:2]) < 3) | (np.abs(boxes[:, 2:] - frame[2:]) < 3)).any(axis=1)
                thin = (boxes[:, 2] - boxes[:, 0] < RULE) | ~high
                found |= sides & thin & (boxes[:, 0] > frame[0] - 3) & (boxes[:, 2] < frame[2] + 3)
        return found

    def column(self, line: Line) -> tuple[float, float]:
        """Left and right end of the column of text that a line stands in."""
        if self.split is None or (line.x0 < self.split - 6 and line.x1 > self.split + 6):
            return (0.0, self.page.width)
        return (0.0, self.split) if (line.x0 + line.x1) / 2 < self.split else (self.split, self.page.width)

    def _is_body(self, line: Line) -> bool:
        """A line of running text, of a listing or a heading: wide, or at the left edge of its column."""
        style = self.style
        if line.turn:
            return False
        left, right = self.margins(self.column(line))
        at_left = abs(line.x0 - left) < 3
        if at_left and line.size >= style.body_size + 0.9 and len(line.text) > 3 and line.text[:1].isalnum():
            return True
        if line.font not in style.body_fonts or line.size < 0.7 * style.body_size:
            return False
        if not line.mono and abs(line.size - style.body_size) > 0.6:
            return False
        width, indent = right - left, line.x0 - left
        if line.width > 0.55 * width and indent < 0.2 * width and not _is_row(line.text):
            return True
        if not line.mono and -3 < indent < 4 * line.size and is_prose(line.text) and line.width > 0.2 * width:
            return True
        # The last word of a paragraph may stand alone at the top of a page.
        return at_left and (line.mono or len(line.text) > 8 or LAST_WORD.match(line.text) is not None)

    def _is_set_to_margin(self, line: Line) -> bool:
        """In font and size of running text, and as far to the right as it."""
        style = self.style
        text = line.font in style.body_fonts and abs(line.size - style.body_size) < 0.3 and not line.mono and not line.turn
        return text and abs(line.x1 - self.margins(self.column(line))[1]) < 2.0

    def _is_wide(self, line: Line) -> bool:
        """In the size of running text, or as wide as it: notes of tables are smaller and narrower."""
        left, right = self.margins(self.column(line))
        return line.size > self.style.body_size - 0.4 or line.width > 0.8 * (right - left)

    def _last_lines(self, body: list[Line]) -> list[Line]:
        """Lines of any length that follow a wide line of text at its pitch, in its font, at its left edge."""
        known = {id(line) for line in body}
        wide = []
        for line in body:
            left, right = self.margins(self.column(line))
            if line.width > 0.7 * (right - left) and not line.mono and is_prose(line.text):
                wide.append(line)
        return [
            line
            for line in self.lines
            if id(line) not in known
            and any(
                0.8 * line.size < line.y0 - other.y0 < 1.4 * line.size
                and abs(line.x0 - other.x0) < 2
                and line.font == other.font
                and abs(line.size - other.size) < 0.3
                for other in wide
            )
        ]

    def margins(self, column: tuple[float, float]) -> tuple[float, float]:
        """Where the text of a column begins and ends."""
        known = self._known_margins.get(column)
        if known is None:
            inside = [line for line in self.page.lines if column[0] - 2 <= line.x0 and line.x1 <= column[1] + 2 and not line.turn]
            starts = Counter(round(line.x0) for line in inside if line.font in self.style.body_fonts)
            left: float | None = min((x for x, count in starts.items() if count >= 3), default=None)
            usual = self.style.margins.get((self._side(column), self.page.number % 2))
            if usual is not None and (left is None or left > usual[0]):
                left = usual[0]
            if left is None:
                left = min((line.x0 for line in inside), default=column[0])
            right = max([line.x1 for line in inside] + ([usual[1]] if usual else []), default=column[1])
            known = (float(left), right)
            self._known_margins[column] = known
        return known

    _known_margins: dict[tuple[float, float], tuple[float, float]] = field(default_factory=dict)

    def _side(self, column: tuple[float, float]) -> str:
        if column == (0.0, self.page.width):
            return "page"
        return "left" if column[0] == 0.0 else "right"

    def _text_frames(self) -> list[Box]:
        """Boxes that hold lines of text and hardly any drawing."""
        boxes = self.boxes
        big = boxes[(boxes[:, 3] - boxes[:, 1] > 2.2 * self.style.body_size) & (boxes[:, 2] - boxes[:, 0] > 60)]
        frames: list[Box] = []
        fonts = self.style.body_fonts
        set_in_text = [line for line in self.lines if (line.mono or line.font in fonts) and not line.turn]
        pieces = np.array(framed_by_lines(boxes, self.rules)).reshape(-1, 4)
        big = np.concatenate([big, pieces])
        small = (boxes[:, 3] - boxes[:, 1] > RULE) & (boxes[:, 2] - boxes[:, 0] > RULE)
        for x0, y0, x1, y1 in np.unique(big, axis=0).tolist():
            held = [line for line in set_in_text if inside(line.box, (x0, y0, x1, y1), 2.0)]
            if not held:
                continue
            within = (boxes[:, 0] > x0 + 1) & (boxes[:, 1] > y0 + 1) & (boxes[:, 2] < x1 - 1) & (boxes[:, 3] < y1 - 1) & small
            filled = sum(line.y1 - line.y0 for line in held)
            if within.sum() <= max(2, len(held) // 2) and filled > 0.35 * (y1 - y0):
                frames.append((x0, y0, x1, y1))
        return frames

    def _texts(self) -> list[Box]:
        """Boxes around three and more lines of prose from one left edge on, at one pitch and in one size."""
        drawn = [box for box in self.clusters if box[3] - box[1] > 36]
        lines = [line for line in self.lines if not line.turn and not line.mono and line.size > 0.8 * self.style.body_size]
        lines = [line for line in lines if not any(inside(line.box, box, 1.0) for box in drawn)]
        found: list[Box] = []
        block: list[Line] = []
        for line in [*sorted(lines, key=lambda line: (round(line.x0 / 2), line.y0)), None]:
            last = block[-1] if block else None
            if line is not None and last is not None and line.font == last.font and 0 < line.y0 - last.y0 < 2.4 * line.size:
                block.append(line)
                continue
            if len(block) >= 3 and is_prose(" ".join(one.text for one in block)):
                found.append(union([one.box for one in block]))
            block = [line] if line is not None else []
        return found

    def _framed_code(self, body: list[Line]) -> list[Line]:
        """Code in frames about as wide as the column: a part of the running text, in whatever font and however far indented."""
        known = {id(line) for line in body}
        found = []
        for line in self.lines:
            if line.mono and not line.turn and id(line) not in known:
                left, right = self.margins(self.column(line))
                wide = [frame for frame in self.frames if frame[2] - frame[0] > 0.75 * (right - left)]
                if any(inside(line.box, frame, 2.0) for frame in wide):
                    found.append(line)
        return found

    def _code_beside_drawings(self) -> set[int]:
        """Ids of the lines of code blocks that stand beside a drawing: both belong to one figure, running text is not set so."""
        drawings = [box for box in self.clusters if box[3] - box[1] > 36 and box[2] - box[0] > 36]
        found: set[int] = set()
        for block in _blocks([line for line in self.lines if line.mono and not line.turn]) if drawings else []:
            for box in drawings:
                beside = [
                    line for line in block if box[1] < line.middle < box[3] and (line.x1 < box[0] + 2 or line.x0 > box[2] - 2)
                ]
                # A block that ends beside the top of a drawing is no part of it.
                shared = sum(line.y1 - line.y0 for line in beside)
                if 2 * len(beside) >= len(block) and shared > 0.15 * (box[3] - box[1]):
                    found |= {id(line) for line in block}
        return found

    def _footnotes(self) -> list[Line]:
        """Small lines under a short rule at the left end of a column."""
        notes: list[Line] = []
        size = self.style.body_size
        for rule in self.rules:
            first = Line("", rule[0], rule[1], rule[2], rule[3], size, "", False)
            left, right = self.margins(self.column(first))
            if abs(rule[0] - left) > 6 or not 0.12 < (rule[2] - rule[0]) / max(right - left, 1.0) < 0.5:
                continue
            below = [
                line
                for line in self.lines
                if line.y1 > rule[3] and line.size < size - 0.4 and left - 6 < line.x0 < right and not line.turn
            ]
            edge = rule[3]
            found: list[Line] = []
            for line in sorted(below, key=lambda line: line.y0):
                if line.y0 - edge > 0.8 * size:
                    break
                found.append(line)
                edge = max(edge, line.y1)
            # The mark and the text start at the margin; a table under its rule starts there, too, but has a second rule.
            closed = any(
                other[1] > rule[3] + 2 and abs(other[0] - rule[0]) < 4 and abs(other[2] - rule[2]) < 4 for other in self.rules
            )
            # Notes of a table stand between it and its caption.
            captioned = any(0 < caption.box[1] - edge < 2.5 * size and caption.box[0] < right for caption in self.captions)
            if found and not captioned and found[0].x0 - left < 3 * size and not closed:
                notes += found
        return notes

    def _is_label(self, line: Line, body: list[Line]) -> bool:
        """A line that looks like text but stands alone inside a drawing."""
        if any(inside(line.box, frame, 2.0) for frame in self.frames):
            return False
        around = [box for box in self.clusters if inside(line.box, box, 1.0) and box[3] - box[1] > 4 * line.size]
        if not around:
            return False
        neighbours = [
            other
            for other in body
            if other is not line
            and abs(other.x0 - line.x0) < 2
            and 0 < abs(other.y0 - line.y0) < 1.6 * line.size
            and min(other.width, line.width) > 0.5 * max(other.width, line.width)
        ]
        return len(neighbours) < 2 or line.width < 0.5 * (around[0][2] - around[0][0])


def _paragraph_lines(lines: list[Line]) -> set[int]:
    """Ids of lines of prose in any font that stand in threes at one pitch and one left edge, such as items of lists."""
    long = [line for line in lines if not line.turn and not line.mono and len(line.text) >= 40 and is_prose(line.text)]
    found = set()
    for line in long:
        near = sum(
            0 < abs(other.y0 - line.y0) < 2.8 * line.size and abs(other.x0 - line.x0) < 2 and abs(other.size - line.size) < 0.3
            for other in long
        )
        if near >= 2:
            found.add(id(line))
    return found


def _is_row(text: str) -> bool:
    """Numbers are half of it or more, as in a row of a table."""
    tokens = text.split()
    numbers = sum(NUMBER.match(token) is not None for token in tokens)
    return numbers >= 2 and 2 * numbers >= len(tokens)


def _flowing_lines(lines: list[Line]) -> set[int]:
    """Ids of lines that follow each other at one pitch from one left edge on, as text does that flows around a figure."""
    found: set[int] = set()
    block: list[Line] = []
    for line in sorted((line for line in lines if len(line.text) >= 20), key=lambda line: (round(line.x0), line.y0)):
        follows = block and abs(line.x0 - block[-1].x0) < 1.5 and 0.8 * line.size < line.y0 - block[-1].y0 < 1.7 * line.size
        block = [*block, line] if follows else [line]
        if len(block) >= LEAST_FLOWING and sum(is_prose(one.text) for one in block) > 0.5 * len(block):
            found |= {id(one) for one in block}
    return found


def _blocks(lines: list[Line]) -> list[list[Line]]:
    """Lines that follow each other at the pitch of lines, together."""
    blocks: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.y0):
        if blocks and line.y0 - blocks[-1][-1].y0 < 2.0 * line.size:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks
