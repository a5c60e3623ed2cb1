"""From the lines of all pages to running text: running heads, columns, reading order, paragraphs.

Everything is decided from the document's own habits: which fonts carry its text, which lines come back on page after page,
where a gap between columns stays free.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from moexpand.data.pdf_text import Box, Line

HEAD_ZONE = 0.12
"""Fraction of the page's height, at the top and at the bottom, where running heads and page numbers stand."""
ENDS = tuple(".!?:;)]}\u201d\u2019\"'")


@dataclass
class Page:
    """One page of the document."""

    number: int
    width: float
    height: float
    lines: list[Line]
    graphics: list[Box] = field(default_factory=list)
    """Boxes of paths, images, shadings and forms."""


@dataclass(frozen=True)
class Style:
    """Fonts that carry the document's text."""

    body_size: float
    body_fonts: frozenset[str]
    """Fonts with at least 4 % of the characters."""


def document_style(pages: list[Page]) -> Style:
    """Size with most characters, and the fonts that are used throughout."""
    sizes: Counter[float] = Counter()
    fonts: Counter[str] = Counter()
    for page in pages:
        for line in page.lines:
            sizes[line.size] += len(line.text)
            fonts[line.font] += len(line.text)
    total = max(sum(fonts.values()), 1)
    body = sizes.most_common(1)[0][0] if sizes else 10.0
    return Style(body, frozenset(font for font, count in fonts.items() if count >= 0.04 * total))


def strip_running_heads(pages: list[Page]) -> None:
    """Remove lines at the top and bottom that come back: the same words (numbers aside) at the same height on several pages.

    Heads whose words change with the chapter are found by place: a height in the zone that many pages use and that is parted
    from the text by a gap. Rules that come back in the zone go with them.
    """
    if len(pages) < 3:
        return
    often = max(3, 0.3 * len(pages))
    zones = _zones(pages)
    repeats: Counter[tuple[str, int]] = Counter()
    alone: Counter[int] = Counter()
    rules: Counter[int] = Counter()
    for page in pages:
        zone = [line for line in page.lines if _in_zone(line.box, zones)]
        repeats.update({(_pattern(line.text), _height(line.box)) for line in zone})
        alone.update({_height(line.box) for line in zone if _stands_apart(line, page)})
        rules.update({_height(box) for box in page.graphics if _is_rule(box, page) and _in_zone(box, zones)})

    def is_head(line: Line) -> bool:
        height = _height(line.box)
        near = (height - 1, height, height + 1)
        pattern = _pattern(line.text)
        return sum(repeats[pattern, y] for y in near) >= 3 or sum(alone[y] for y in near) >= often

    for page in pages:
        page.lines = [line for line in page.lines if not (_in_zone(line.box, zones) and is_head(line))]
        page.graphics = [
            box for box in page.graphics if not (_is_rule(box, page) and _in_zone(box, zones) and rules[_height(box)] >= often)
        ]


def _zones(pages: list[Page]) -> tuple[float, float]:
    """Heads end above the first height and feet begin below the second; small type areas on large paper move both inwards."""
    filled = [page for page in pages if page.lines]
    height = sorted(page.height for page in pages)[len(pages) // 2]
    if not filled:
        return (HEAD_ZONE * height, (1 - HEAD_ZONE) * height)
    tops = sorted(min(line.y0 for line in page.lines) for page in filled)
    bottoms = sorted(max(line.y1 for line in page.lines) for page in filled)
    middle = len(filled) // 2
    return (
        max(HEAD_ZONE * height, tops[middle] + 0.03 * height),
        min((1 - HEAD_ZONE) * height, bottoms[middle] - 0.03 * height),
    )


def _in_zone(box: Box, zones: tuple[float, float]) -> bool:
    return box[3] < zones[0] or box[1] > zones[1]


def _is_rule(box: Box, page: Page) -> bool:
    return box[3] - box[1] < 2 and box[2] - box[0] > 0.3 * page.width


def _height(box: Box) -> int:
    """Where a box stands, in steps of 3 points."""
    return round((box[1] + box[3]) / 6)


def _pattern(text: str) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", text)


def _stands_apart(line: Line, page: Page) -> bool:
    """Nothing but lines of the same height lies between this line and the page's edge, and a gap parts it from the text."""
    top = line.middle < page.height / 2
    others = [other for other in page.lines if abs(other.middle - line.middle) > 0.6 * line.size]
    if top:
        return all(other.middle > line.middle for other in others) and all(
            other.y0 - line.y1 > 0.8 * line.size for other in others
        )
    return all(other.middle < line.middle for other in others) and all(line.y0 - other.y1 > 0.8 * line.size for other in others)


def gutters(pages: list[Page]) -> dict[int, float | None]:
    """x of the free strip between two columns of text, or None, by page number.

    A page that has too little text to show its columns (a large figure, the last page) has those of the document when half of
    the pages agree and few of its own lines cross the strip.
    """
    found = {page.number: _gutter(page) for page in pages}
    known = sorted(x for x in found.values() if x is not None)
    if len(known) * 2 < len(pages) or not known:
        return found
    usual = known[len(known) // 2]
    for page in pages:
        wide = _wide_lines(page)
        crossing = sum(line.x0 < usual - 6 and line.x1 > usual + 6 for line in wide)
        if found[page.number] is None and crossing <= 0.4 * len(wide):
            found[page.number] = usual
    return found


def _wide_lines(page: Page) -> list[Line]:
    return [line for line in page.lines if line.width > 0.2 * page.width and len(line.text) > 15]


def _gutter(page: Page) -> float | None:
    wide = _wide_lines(page)
    free: list[tuple[int, float]] = []
    for step in range(40, 61):
        x = page.width * step / 100
        left = [line for line in wide if line.x1 <= x + 1]
        right = [line for line in wide if line.x0 >= x - 1]
        crossing = len(wide) - len(left) - len(right)
        if min(len(left), len(right)) < 6 or crossing > 0.4 * len(wide):
            continue
        # The right column's lines start at one place; lines that begin anywhere are no column.
        starts = Counter(round(line.x0 / 4) for line in right)
        if starts.most_common(1)[0][1] < 0.35 * len(right):
            continue
        free.append((crossing, x))
    if not free:
        return None
    strip = [x for crossing, x in free if crossing == min(free)[0]]
    return (strip[0] + strip[-1]) / 2


def reading_order(lines: list[Line], split: float | None) -> list[list[Line]]:
    """Blocks of lines in the order in which one reads them; a block is one column between two full-width lines.

    Args:
        lines: of one page.
        split: the page's gutter.
    """
    rows = sorted(_join_rows(lines), key=lambda line: (line.y0, line.x0))
    if split is None:
        return [rows] if rows else []
    blocks: list[list[Line]] = []
    band: dict[str, list[Line]] = defaultdict(list)

    def flush() -> None:
        blocks.extend(band[side] for side in ("left", "right") if band[side])
        band.clear()

    for line in rows:
        if line.x0 < split - 6 and line.x1 > split + 6:
            flush()
            if blocks and blocks[-1] and blocks[-1][-1].x1 > split + 6:
                blocks[-1].append(line)
            else:
                blocks.append([line])
        else:
            band["left" if (line.x0 + line.x1) / 2 < split else "right"].append(line)
    flush()
    return blocks


def _join_rows(lines: list[Line]) -> list[Line]:
    """Join neighbours in the stream that stand on one row: pieces of formulas, superscripts, spaced listings."""
    rows: list[Line] = []
    for line in lines:
        last = rows[-1] if rows else None
        if last is not None:
            overlap = min(last.y1, line.y1) - max(last.y0, line.y0)
            gap = line.x0 - last.x1
            height = min(last.y1 - last.y0, line.y1 - line.y0)
            limit = (8.0 if line.mono and last.mono else 2.5) * max(last.size, line.size)
            if overlap > 0.5 * height and -0.5 * last.size < gap < limit:
                character = max(last.width / len(last.text), 1.0)
                space = max(1, round(gap / character)) if line.mono and last.mono else int(gap > 0.12 * line.size)
                bigger = last if len(last.text) >= len(line.text) else line
                rows[-1] = Line(
                    text=last.text + " " * space + line.text,
                    x0=min(last.x0, line.x0),
                    y0=min(last.y0, line.y0),
                    x1=max(last.x1, line.x1),
                    y1=max(last.y1, line.y1),
                    size=bigger.size,
                    font=bigger.font,
                    mono=bigger.mono,
                    page=last.page,
                )
                continue
        rows.append(line)
    return rows


@dataclass
class Paragraph:
    """Lines that belong together."""

    page: int
    lines: list[Line]

    @property
    def mono(self) -> bool:
        """A listing, whose line breaks matter."""
        return sum(line.mono for line in self.lines) * 2 > len(self.lines)


def paragraphs_of(block: list[Line]) -> list[Paragraph]:
    """Cut a block where the pitch, the size, the indent or the kind of font changes."""
    if not block:
        return []
    gaps = sorted(b.y0 - a.y0 for a, b in pairwise(block) if b.y0 - a.y0 > 0.5 * a.size)
    pitch = gaps[len(gaps) // 3] if gaps else block[0].size * 1.2
    left = Counter(round(line.x0) for line in block).most_common(1)[0][0]
    result = [Paragraph(block[0].page, [block[0]])]
    for last, line in pairwise(block):
        step = line.y0 - last.y0
        indented = 0.8 * line.size < line.x0 - left < 4 * line.size and abs(last.x0 - left) < 0.5 * line.size
        apart = step > 1.3 * pitch or line.y1 < last.y0
        if line.mono and last.mono:
            new = step > 1.6 * pitch
        else:
            new = apart or line.mono != last.mono or abs(line.size - last.size) > 0.12 * last.size or indented
        broken_word = not line.mono and re.search(r"[^\W\d_]-$", last.text) and line.text[:1].islower() and not apart
        if new and not broken_word and not (step < 0.6 * pitch and not apart):
            result.append(Paragraph(line.page, [line]))
        else:
            result[-1].lines.append(line)
    return result


def paragraph_text(paragraph: Paragraph, words: Counter[str]) -> str:
    """Text of a paragraph: listings keep their lines and indents, running text is joined over line ends and hyphens.

    Args:
        words: how often each word stands unbroken in the document; decides whether a hyphen at a line end is the word's own.
    """
    lines = paragraph.lines
    if paragraph.mono:
        left = min(line.x0 for line in lines)
        widths = sorted(line.width / len(line.text) for line in lines)
        character = max(widths[len(widths) // 2], 1.0)
        return "\n".join(" " * round((line.x0 - left) / character) + line.text for line in lines)
    return join_text([line.text for line in lines], words)


def join_text(parts: list[str], words: Counter[str]) -> str:
    """Join pieces of running text with spaces, or without where a word was broken."""
    text = parts[0] if parts else ""
    for part in parts[1:]:
        broken = re.search(r"([^\W\d_]+)-$", text)
        following = re.match(r"[^\W\d_]+", part)
        if broken and following and following.group()[0].islower():
            head, tail = broken.group(1).lower(), following.group().lower()
            keeps = words[f"{head}-{tail}"] > words[head + tail]
            text = (text if keeps else text[:-1]) + part
        else:
            text = f"{text} {part}" if text else part
    return re.sub(r"\s+", " ", text).strip()


def count_words(pages: list[Page]) -> Counter[str]:
    """How often each word, hyphenated ones whole, stands inside a line."""
    words: Counter[str] = Counter()
    for page in pages:
        for line in page.lines:
            words.update(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*(?!\w|-$)", line.text.lower()))
    return words


def goes_on(text: str, following: str) -> bool:
    """Whether a paragraph that a column or page ends with goes on in the next one."""
    return bool(text) and bool(following) and not text.rstrip().endswith(ENDS) and following[0].islower()
