"""What happened to a run, for its report: starts, checkpoints, skipped steps, stops; from events.jsonl."""

from collections import Counter
from typing import Any

from moexpand.train.report_plots import Run

MOST_EVENTS = 300
"""Of a run on the page; of more, checkpoints are left out first, then the oldest."""


def restarts(run: Run) -> list[int]:
    """Steps from which a run went on after its first start."""
    return [row["step"] for row in run.events if row.get("event") == "started"][1:]


def shown(run: Run) -> list[dict[str, Any]]:
    """The events that the page lists."""
    rows = run.events
    if len(rows) > MOST_EVENTS:
        rows = [row for row in rows if row.get("event") != "saved"]
    return rows[-MOST_EVENTS:]


def counted(run: Run) -> str:
    """How often each kind of event was, as `started 2, saved 14`."""
    return ", ".join(f"{kind} {number}" for kind, number in Counter(str(row.get("event")) for row in run.events).items())
