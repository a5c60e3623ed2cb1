"""Pictures of one or several runs over their steps, as inline SVG for a page without scripts or links.

matplotlib is imported when something is drawn. A line or a picture that no run has figures for is left out.
"""

import html
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from moexpand.train.tables import Rows, series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#444444", "#7b3294")
GREY = "#555555"
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "moexpand", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "axes.edgecolor": "#888888", "axes.axisbelow": True, "lines.linewidth": 1.3, "legend.frameon": False,
    "axes.formatter.useoffset": False,
}  # fmt: skip
MOST_POINTS = 1000
"""Of a line; more are thinned to the least and the greatest of equal stretches."""
FEW_POINTS = 60
"""So many values are marked one by one."""
MANY_POINTS = 400
"""From so many on, every value is faint, and the medians of equal stretches are strong."""
STRETCHES = 100

Entries = list[tuple["Artist", str]]


@dataclass(frozen=True)
class Run:
    """What is drawn of a run.

    Attributes:
        name: short, and no other run's; stands beside its colour on the page, and not in the pictures.
        settings: its config.yaml by dotted keys; empty where there is none.
        rows, evaluations, events: its tables.
    """

    name: str
    settings: dict[str, Any]
    rows: Rows
    evaluations: Rows = field(default_factory=list)
    events: Rows = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A figure of metrics.jsonl over the steps; left out where it equals the figure `unlike` on every row."""

    key: str
    label: str
    unlike: str = ""


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        title, unit, good: heading, label of the vertical axis, and the line below that says what good looks like.
        lines: figures over steps.
        draw: draws what lines cannot say, and returns entries of the legend.
        scale: of the vertical axis; `auto` is `log` where values lie far apart and above 0.
        zero: the axis starts at 0.
        robust: a few values far above all others do not squeeze the rest.
        distance: draw 1 - value.
        exact: the values have no noise; a long run needs no medians.
        wide: as wide as the page.
    """

    title: str
    unit: str
    good: str
    lines: tuple[Line, ...] = ()
    draw: Callable[["Axes", Sequence[Run]], Entries] | None = None
    scale: str = "linear"
    zero: bool = False
    robust: bool = False
    distance: bool = False
    exact: bool = False
    wide: bool = False


@contextmanager
def style() -> Iterator[None]:
    """matplotlib with the settings of a report inside, whatever a user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def colours(number: int) -> list[str]:
    """Colours of so many runs or lines, as #rrggbb."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, number))]


def draw(plot: Plot, runs: Sequence[Run]) -> "Figure | None":
    """The picture of these runs, inside `style`; None when they have none of its figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11.4, 4.2) if plot.wide else (5.6, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if plot.wide else 6))
    entries = _lines(axes, plot, runs)
    if plot.draw is not None:
        entries += plot.draw(axes, runs)
    if not axes.has_data():
        return None
    _limits(axes, plot)
    _legend(axes, entries, 165 if plot.wide else 80)
    return figure


def to_svg(figure: "Figure", number: int, title: str) -> str:
    """A picture as an element of a page: no links, short coordinates, identities that no other picture of the page has."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>p{number}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1).strip()


# ---------------------------------------------------------------- lines


def _lines(axes: "Axes", plot: Plot, runs: Sequence[Run]) -> Entries:
    """One run: a colour for each figure. Several: a colour for each run, a style for each figure."""
    from matplotlib.lines import Line2D

    drawn: dict[int, dict[str, Any]] = {}
    palette = colours(len(runs)) if len(runs) > 1 else colours(len(plot.lines))
    for number, run in enumerate(runs):
        for place, line in enumerate(plot.lines):
            steps, values = series(run.rows, line.key)
            values = 1 - values if plot.distance else values
            if plot.scale == "log":
                values = np.where(values > 0, values, np.nan)
            if not np.isfinite(values).any() or _repeats(run, line):
                continue
            look: dict[str, Any] = {"color": palette[place if len(runs) == 1 else number]}
            if len(runs) > 1:
                look["linestyle"] = STYLES[place]
            plain(axes, steps, values, plot.exact, **look)
            drawn[place] = look if len(runs) == 1 else look | {"color": GREY}
    if len(plot.lines) == 1 and plot.draw is None:
        return []  # the heading says it
    return [(Line2D([], [], **drawn[place]), plot.lines[place].label) for place in sorted(drawn)]


def plain(axes: "Axes", steps: np.ndarray, values: np.ndarray, exact: bool = False, **look: Any) -> None:
    """A line, few points marked one by one, many behind the medians of stretches."""
    points = np.isfinite(values).sum()
    if points < MANY_POINTS or exact:
        marked: dict[str, Any] = {"marker": "o", "markersize": 3} if points <= FEW_POINTS else {}
        axes.plot(*thinned(steps, values), **marked | look)
        return
    axes.plot(*thinned(steps, values), **look | {"linestyle": "-", "linewidth": 0.6, "alpha": 0.25})
    finite = np.isfinite(values)
    stretches = np.array_split(np.flatnonzero(finite), STRETCHES)
    axes.plot([np.median(steps[each]) for each in stretches], [np.median(values[each]) for each in stretches], **look)


def mark(axes: "Axes", steps_of: Sequence[Sequence[int]], label: str, marker: str, alone: str) -> Entries:
    """Marks of each run's steps at the foot of a picture, and their entry in the legend.

    Args:
        alone: colour where there is one run; several have their own.
    """
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "", "marker": marker, "markersize": 6}
    several = len(steps_of) > 1
    for steps, colour in zip(steps_of, colours(len(steps_of)) if several else [alone], strict=True):
        if len(steps):
            some = np.array(steps)[np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS // 4).astype(int))]
            axes.plot(some, np.full(len(some), 0.03), transform=axes.get_xaxis_transform(), color=colour, **look)
    return [(Line2D([], [], color=GREY if several else alone, **look), label)] if any(map(len, steps_of)) else []


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `MOST_POINTS` points that keep every peak: the least and the greatest value of equal stretches."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = [0, len(steps) - 1]
    for stretch in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        finite = stretch[np.isfinite(values[stretch])]
        kept += [finite[values[finite].argmin()], finite[values[finite].argmax()]] if len(finite) else [stretch[0]]
    places = np.unique(kept)
    return steps[places], values[places]


def _repeats(run: Run, line: Line) -> bool:
    return bool(line.unlike) and all(row.get(line.key) == row.get(line.unlike) for row in run.rows)


def _limits(axes: "Axes", plot: Plot) -> None:
    from matplotlib.ticker import NullFormatter

    found = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines() if line.get_transform() == axes.transData]
    values = np.concatenate([*found, np.empty(0)])
    values = values[np.isfinite(values)]
    far = plot.scale == "auto" and values.size > 0 and values.min() > 0 and values.max() > 30 * values.min()
    if plot.scale == "log" or far:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if values.max(initial=1) < 100 * values.min(initial=1):
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif plot.zero:
        axes.set_ylim(bottom=min(0.0, values.min(initial=0.0)))
    if plot.robust and values.size >= 10 and values.max() > 3 * (usual := float(np.percentile(values, 97))) > 0:
        axes.set_ylim(top=1.5 * usual)
        axes.annotate(
            f"{(values > 1.5 * usual).sum()} above, up to {values.max():,.4g}",
            (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", color="#666666",
        )  # fmt: skip


def _legend(axes: "Axes", entries: Entries, characters: int) -> None:
    """Above the picture, where it hides nothing."""
    if not entries:
        return
    handles, names = zip(*entries, strict=True)
    columns = len(names)
    if sum(len(name) + 6 for name in names) > characters:
        columns = max(1, characters // (max(map(len, names)) + 6))
    axes.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.8)
