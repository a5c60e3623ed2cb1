"""What happened to a run, for its report: starts, checkpoints, skipped steps, stops; from events.jsonl."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moexpand.train.report_plots import GREY, MOST_POINTS, Entries, Run, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def mark_restarts(axes: "Axes", runs: Sequence[Run]) -> Entries:
    """Triangles at the steps from which runs went on."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "", "marker": "^", "markersize": 6}
    found = False
    for run, colour in zip(runs, ["#202020"] if len(runs) == 1 else colours(len(runs)), strict=True):
        steps = np.array(restarts(run))
        if len(steps):
            steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS // 4).astype(int))]
            axes.plot(steps, np.full(len(steps), 0.03), transform=axes.get_xaxis_transform(), color=colour, **look)
            found = True
    return [(Line2D([], [], color="#202020" if len(runs) == 1 else GREY, **look), "restarts")] if found else []
