"""What is said at the end of a run: how long, how fast, where the losses went, what happened on the way."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from moexpand.base.errors import MoexpandError
from moexpand.train.tables import EVALUATIONS, EVENTS, METRICS, read_rows


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, `2:03`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def summary(run: Path) -> list[str]:
    """Lines about the whole run, its restarts included, from the tables in its folder; a run that is done cannot fail by them."""
    try:
        steps, events, evaluations = (read_rows(run / name) for name in (METRICS, EVENTS, EVALUATIONS))
    except MoexpandError as error:
        return [f"There is no summary: {error}"]
    if not steps:
        return []
    tenth = max(1, len(steps) // 10)
    spent = sum(row["seconds"] for row in steps)
    waited = sum(row["data_seconds"] for row in steps)
    speed = statistics.median(row["tokens_per_second"] for row in steps)
    lines = [
        f"{len(steps):,} steps, {steps[-1]['tokens']:,} tokens in {clock(spent)}: {speed:,.0f} tok/s (median), "
        f"{waited / spent:.1%} of the time waiting for data",
        f"loss {_loss(steps[:tenth])} in the first tenth, {_loss(steps[-tenth:])} in the last{_held_out(evaluations)}",
    ]
    counted = Counter(row["event"] for row in events)
    told = [f"{counted['started'] - 1} restarts"] if counted["started"] > 1 else []
    told += [f"{counted[kind]} {words}" for kind, words in _WORDS.items() if counted[kind]]
    return [*lines, *([", ".join(told)] if told else [])]


_WORDS = {"skipped": "skipped steps", "leapt": "leaps that were taken", "save failed": "checkpoints that could not be written"}


def _loss(rows: list[dict[str, Any]]) -> str:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return f"{sum(losses) / len(losses):.4f}" if losses else "not finite"


def _held_out(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    beside = f", the parent's {last['parent_loss']:.4f}" if last.get("parent_loss") is not None else ""
    begun, ended = (f"{_loss([{'loss': row['held_out_loss']}])} at step {row['step']}" for row in (first, last))
    return f"; held out {begun}, {ended}{beside}"
