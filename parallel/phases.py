"""Wall time of the parts of a step, measured only while somebody asks.

On a GPU the clock waits for the work before and after each part, which costs overlap: measured steps are a little slower.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_seconds: dict[str, float] | None = None


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds of every part inside, by name, added up; a part inside another counts in both."""
    global _seconds
    outer, _seconds = _seconds, {}
    try:
        yield _seconds
    finally:
        _seconds = outer


@contextmanager
def timed(name: str) -> Iterator[None]:
    """A part of a step."""
    if _seconds is None:
        yield
        return
    began = _now()
    yield
    if _seconds is not None:
        _seconds[name] = _seconds.get(name, 0.0) + _now() - began


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
