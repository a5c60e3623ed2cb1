"""Plain output is the same text everywhere; a terminal gets rich."""

import io

from moexpand.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_table_aligns_words_left_and_numbers_right() -> None:
    stream = io.StringIO()
    Console(stream=stream).table(["part", "parameters"], [["router", 1024], ["experts", 1234567]], title="Model")
    assert stream.getvalue().splitlines() == ["Model", "part     parameters", "router        1,024", "experts   1,234,567"]


def test_plain_is_plain_on_a_terminal_too() -> None:
    stream = Terminal()
    console = Console(plain=True, stream=stream)
    console.table(["[a]"], [["[red]x"]])
    with console.progress("copying", 4) as advance:
        for _ in range(4):
            advance(1)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[:2] == ["[a]", "[red]x"]
    assert "copying: 4 of 4" in stream.getvalue()


def test_terminal_table_keeps_brackets_as_text() -> None:
    stream = Terminal()
    Console(stream=stream).table(["name"], [["[red]x"]])
    assert "[red]x" in stream.getvalue()


def test_progress_without_a_terminal_writes_a_line_a_tenth() -> None:
    stream = io.StringIO()
    with Console(stream=stream).progress("tokens", 1000) as advance:
        for _ in range(1000):
            advance(1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "tokens: 1,000 of 1,000"
