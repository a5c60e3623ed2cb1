"""From lines to running text: reading order, rows, paragraphs, words broken at line ends."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

from moexpand.data.pdf_layout import Page
from moexpand.data.pdf_text import Line

ENDS = tuple(".!?:;)]}\u201d\u2019\"'")
BROKEN = re.compile(r"[^\W\d_]-$")


@dataclass
class Text:
    """A paragraph of running text."""

    page: int
    """From 0; where it begins."""
    text: str
    lines: list[Line]


def running_text(pages: list[Page], columns: dict[int, float | None], words: Counter[str]) -> list[Text]:
    """All paragraphs in reading order, joined where a column or page broke them. Text that is turned is no running text."""
    texts: list[Text] = []
    last: Paragraph | None = None
    for page in pages:
        for block in reading_order([line for line in page.lines if not line.turn], columns[page.number]):
            for i, paragraph in enumerate(paragraphs_of(block)):
                text = paragraph_text(paragraph, words)
                if not text:
                    continue
                if i == 0 and last is not None and not last.mono and not paragraph.mono and goes_on(texts[-1].text, text):
                    texts[-1].text = join_text([texts[-1].text, text], words)
                    texts[-1].lines += paragraph.lines
                else:
                    texts.append(Text(page.number, text, list(paragraph.lines)))
                last = paragraph
    return texts


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
        broken_word = not line.mono and BROKEN.search(last.text[-2:]) and line.text[:1].islower() and not apart
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
        # The search must not wander through the whole text: paragraphs grow line by line.
        broken = re.search(r"([^\W\d_]+)-$", text[-40:]) if text.endswith("-") else None
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
