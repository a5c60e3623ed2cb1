"""What is told about progress is true: how much is done, how fast this process is, how long it still takes."""

import io
import re

import pytest

from moexpand.upcycle import meter as module
from moexpand.upcycle.meter import Meter, metered


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_bytes_found_count_as_done_but_not_as_speed(clock: Clock) -> None:
    meter = Meter("expanding", 10_000_000_000, lambda line: None)
    meter.found(4_000_000_000)
    assert meter.state() == "4.0 of 10.0 GB"
    clock.now += 2
    meter(2_000_000_000)
    assert meter.state() == "6.0 of 10.0 GB, 1,000 MB/s, 4 s left"


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_time_left_is_told_in_words(clock: Clock, seconds: int, text: str) -> None:
    meter = Meter("", 1_000_000 * (seconds + 1), lambda line: None)
    clock.now += 1
    meter(1_000_000)
    assert meter.state().endswith(f", {text} left")


def test_lines_come_now_and_then(clock: Clock) -> None:
    lines: list[str] = []
    meter = Meter("expanding", 1000, lines.append, every=5.0)
    for _ in range(20):
        clock.now += 1
        meter(50)
    assert len(lines) == 4
    assert lines[-1].startswith("expanding: ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_speed_and_time_left() -> None:
    stream = Terminal()
    with metered("expanding", 4_000_000_000, stream=stream) as meter:
        meter.found(1_000_000_000)
        meter(3_000_000_000)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "expanding" in text
    assert "100%" in text
    assert "4.0 of 4.0 GB" in text
    assert re.search(r"MB/s,\s+0 s", text)


def test_elsewhere_there_are_plain_lines() -> None:
    stream = io.StringIO()
    with metered("expanding", 100, stream=stream) as meter:
        meter.every = 0.0
        meter(50)
    assert stream.getvalue().startswith("expanding: 0.0 of 0.0 GB")
    assert "\x1b" not in stream.getvalue()
