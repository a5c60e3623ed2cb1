"""What the commands print: plain lines everywhere, tables and progress bars in colour on a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO


class Console:
    """Writes to a stream; rich is imported only where it is used.

    Args:
        plain: plain lines even on a terminal.
        stream: where to; standard output when not given.
    """

    def __init__(self, plain: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.rich = not plain and self.stream.isatty()

    def line(self, text: str) -> None:
        """Write one line at once."""
        print(text, file=self.stream, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
        """Write a table; a cell of None is blank, and columns that hold only numbers are aligned to the right."""
        texts = [[_text(cell) for cell in row] for row in rows]
        right = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
        if self.rich:
            self._rich_table(columns, texts, right, title)
            return
        widths = [max(len(line[i]) for line in [list(columns), *texts]) for i in range(len(columns))]
        if title:
            self.line(title)
        for line in [list(columns), *texts]:
            cells = [
                cell.rjust(width) if end else cell.ljust(width) for cell, width, end in zip(line, widths, right, strict=True)
            ]
            self.line("  ".join(cells).rstrip())

    def _rich_table(self, columns: Sequence[str], texts: list[list[str]], right: list[bool], title: str) -> None:
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
        for column, end in zip(columns, right, strict=True):
            table.add_column(escape(column), justify="right" if end else "left")
        for line in texts:
            table.add_row(*(escape(cell) for cell in line))
        RichConsole(file=self.stream).print(table)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how much of `total` is done; yields a function that adds to it. Without a terminal: a line every tenth."""
        if self.rich:
            from rich.console import Console as RichConsole
            from rich.progress import Progress

            with Progress(console=RichConsole(file=self.stream)) as bar:
                task = bar.add_task(label, total=total)
                yield lambda amount: bar.advance(task, amount)
            return
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            tenth = done * 10 // max(total, 1)
            done += amount
            if done * 10 // max(total, 1) > tenth:
                self.line(f"{label}: {done:,} of {total:,}")

        yield advance


def _text(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
