"""What a report shows: its sections, the pictures in them, and a line under each that says what good looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moexpand.train.report_events import restarts
from moexpand.train.report_plots import FEW_POINTS, GREY, Entries, Line, Plot, Run, colours, mark, plain
from moexpand.train.tables import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORWARD = ("router", "dispatch", "experts", "combine")
"""Parts of a step that lie inside `forward_backward`."""
AFTER = "siblings"
"""What is measured after a step and is no part of it."""


# ---------------------------------------------------------------- pictures of their own


def _loss(axes: "Axes", runs: Sequence[Run]) -> Entries:
    from matplotlib.lines import Line2D

    entries: Entries = []
    entropies: dict[float, str] = {}
    parents: dict[float, str] = {}
    training: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.7, "markersize": 2}
    held_out: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 4}
    one = colours(1)[0] if len(runs) == 1 else GREY
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        steps, values = series(run.rows, "loss")
        if np.isfinite(values).any():
            plain(axes, steps, values, color=colour, **training)
            entries.append((Line2D([], [], color=one, **training), "training"))
        steps, values = series(run.evaluations, "held_out_loss")
        if np.isfinite(values).any():
            marked = held_out if len(steps) <= FEW_POINTS else held_out | {"marker": ""}
            axes.plot(steps, values, color=colour, **marked)
            entries.append((Line2D([], [], color=one, **held_out), "held-out"))
        _, values = series(run.evaluations, "unigram_entropy")
        for value in np.unique(values[np.isfinite(values)].round(9)):
            entropies.setdefault(float(value), colour)
        _, values = series(run.evaluations, "parent_loss")
        parents |= {float(value): colour for value in np.unique(values[np.isfinite(values)].round(9))}
    entries = list({name: (handle, name) for handle, name in entries}.values())
    for value, colour in parents.items():
        axes.axhline(value, color=colour if len(parents) > 1 else "#202020", linestyle=(0, (6, 2, 1, 2)), linewidth=1.2)
    if parents:
        look: dict[str, Any] = {"linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.2}
        entries.append((Line2D([], [], color=GREY if len(parents) > 1 else "#202020", **look), "held-out, parent"))
    for value, colour in entropies.items():
        axes.axhline(value, color=colour if len(entropies) > 1 else GREY, linestyle="--", linewidth=1.0)
    if entropies:
        entries.append((Line2D([], [], color=GREY, linestyle="--", linewidth=1.0), "entropy of token frequencies"))
    return entries + _skipped(axes, runs) + mark(axes, list(map(restarts, runs)), "restarts", "^", "#202020")


def _held_out_differences(axes: "Axes", runs: Sequence[Run]) -> Entries:
    """Each run's held-out loss minus the first's, at the steps that both evaluated."""
    steps, values = series(runs[0].evaluations, "held_out_loss")
    base = dict(zip(steps, values, strict=True))
    for run, colour in list(zip(runs, colours(len(runs)), strict=True))[1:]:
        steps, values = series(run.evaluations, "held_out_loss")
        differences = np.array([value - base.get(step, np.nan) for step, value in zip(steps, values, strict=True)])
        both = np.isfinite(differences)
        if both.any():
            axes.plot(steps[both], differences[both], color=colour, marker="o" if len(steps) <= FEW_POINTS else "", markersize=4)
    if axes.has_data():
        axes.axhline(0, color=colours(1)[0], linewidth=1.0)
    return []


def _clipping(axes: "Axes", runs: Sequence[Run]) -> Entries:
    """Where gradients begin to be clipped, and the steps that were skipped."""
    from matplotlib.lines import Line2D

    norms = {run.settings.get("optim.clip_grad") for run in runs if axes.has_data()}
    look: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.4}
    bounds = [norm for norm in norms if isinstance(norm, int | float) and norm > 0]
    for norm in bounds:
        axes.axhline(norm, **look)
    return [(Line2D([], [], **look), "clipped above")][: len(bounds)] + _skipped(axes, runs)


def _skipped(axes: "Axes", runs: Sequence[Run]) -> Entries:
    return mark(axes, [[row["step"] for row in run.rows if row.get("skipped")] for run in runs], "skipped steps", "x", "#c00000")


def phase_names(runs: Sequence[Run]) -> list[str]:
    """Parts of a step that some run measured, those of the forward pass first."""
    keys = {key: None for run in runs for row in run.rows for key, value in row.items() if value is not None}
    found = [key.removeprefix("time/") for key in keys if key.startswith("time/")]
    return [name for name in FORWARD if name in found] + [name for name in found if name not in FORWARD]


def _phases(axes: "Axes", runs: Sequence[Run]) -> Entries:
    """One run: parts of its measured steps, stacked. Several: medians side by side."""
    names = phase_names(runs)
    if not names:
        return []
    return _stacked(axes, runs[0], names) if len(runs) == 1 else _bars(axes, runs, names)


def _stacked(axes: "Axes", run: Run, names: list[str]) -> Entries:
    from matplotlib.patches import Patch

    measured = [row for row in run.rows if any(f"time/{name}" in row for name in names if name != AFTER)]
    if not measured:
        return []
    steps = np.array([row["step"] for row in measured], dtype=float)
    parts = {
        name: np.nan_to_num(series([{f"time/{name}": 0.0} | row for row in measured], f"time/{name}")[1])
        for name in names
        if name != AFTER
    }
    if "forward_backward" in parts:
        inside = sum((parts[name] for name in FORWARD if name in parts), np.zeros(len(steps)))
        rest = np.maximum(parts.pop("forward_backward") - inside, 0)
        forward = {name: parts.pop(name) for name in FORWARD if name in parts}
        parts = forward | {"backward and the rest of forward": rest} | parts
    stretches = np.array_split(np.arange(len(steps)), min(len(steps), FEW_POINTS))
    places = np.array([np.median(steps[each]) for each in stretches])
    width = 0.8 * max(np.diff(places).min(), (places[-1] - places[0]) / 200) if len(places) > 1 else 0.8
    bottom = np.zeros(len(places))
    for values, colour in zip(parts.values(), palette := colours(len(parts)), strict=True):
        heights = np.array([np.median(values[each]) for each in stretches])
        axes.bar(places, heights, width, bottom, color=colour, linewidth=0)
        bottom += heights
    axes.set_ylim(bottom=0)
    return [(Patch(color=colour), name) for name, colour in zip(parts, palette, strict=True)]


def _bars(axes: "Axes", runs: Sequence[Run], names: list[str]) -> Entries:
    from matplotlib.ticker import AutoLocator

    height = 0.8 / len(runs)
    for number, (run, colour) in enumerate(zip(runs, colours(len(runs)), strict=True)):
        for place, name in enumerate(names):
            values = series(run.rows, f"time/{name}")[1]
            values = values[np.isfinite(values)]
            if len(values):
                axes.barh(place + (number - (len(runs) - 1) / 2) * height, float(np.median(values)), height, color=colour)
    axes.set(xlabel="seconds, median", ylabel="", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return []


# ---------------------------------------------------------------- the sections

_SIBLINGS = (
    Line("moe/sibling_weights", "sibling_weights"),
    Line("moe/sibling_router", "sibling_router"),
    Line("moe/sibling_outputs", "sibling_outputs"),
)


@dataclass(frozen=True)
class Section:
    """A heading of the page.

    Attributes:
        anchor: what links of the page call it.
        about: a sentence below the heading.
    """

    anchor: str
    title: str
    about: str
    plots: tuple[Plot, ...]


SECTIONS = (
    Section(
        "loss",
        "Loss",
        "Nats per token, without auxiliary losses.",
        (
            Plot(
                "Training and held-out loss",
                "nats per token",
                "Held-out loss falls, and ends well below the dashed line; a model above that may have learnt no context.",
                draw=_loss,
                wide=True,
            ),
            Plot(
                "Held-out loss beside the first run's",
                "difference, nats per token",
                "Below 0 is better than the first run, at the same step.",
                draw=_held_out_differences,
                wide=True,
            ),
        ),
    ),
    Section(
        "gradient",
        "Gradient and learning rate",
        "The norm is that of all gradients before clipping, auxiliary losses included.",
        (
            Plot(
                "Gradient norm",
                "norm",
                "Steady or falling after the warm-up; growth or many clipped steps ask for a lower learning rate.",
                (Line("grad_norm", "gradient norm"),),
                draw=_clipping,
                scale="auto",
                zero=True,
            ),
            Plot(
                "Learning rate",
                "learning rate",
                "Follows optim.schedule; the routers' rate appears where it differs.",
                (Line("lr", "learning rate"), Line("router_lr", "of the routers", unlike="lr")),
                zero=True,
                exact=True,
            ),
        ),
    ),
    Section(
        "load",
        "Load balance",
        "From the token copies that were really dispatched in a step, mean over the layers.",
        (
            Plot(
                "Spread of the experts' load",
                "standard deviation / mean",
                "load_cv: 0 is uniform; a steady rise is a router that collapses on few experts.",
                (Line("moe/load_cv", "load_cv"), Line("moe/group_load_cv", "group_load_cv (inside groups)")),
                zero=True,
            ),
            Plot(
                "Busiest expert",
                "largest load / mean",
                "load_max: 1 is uniform; the busiest expert decides the memory and the time of its rank.",
                (Line("moe/load_max", "load_max"), Line("moe/group_load_max", "group_load_max (inside groups)")),
                scale="auto",
            ),
            Plot(
                "Entropy of the load",
                "entropy / ln E",
                "load_entropy: 1 is uniform, 0 is one expert for all tokens.",
                (Line("moe/load_entropy", "load_entropy"),),
            ),
            Plot(
                "Experts without a token",
                "fraction of the experts",
                "dead_experts: 0 is good, and none for long; with few tokens a step some are empty by chance.",
                (Line("moe/dead_experts", "dead_experts"),),
                zero=True,
            ),
            Plot(
                "Balance losses",
                "loss without coefficient",
                "balance_loss: 1 is uniform; a rise says that its coefficient is too small.",
                (Line("moe/balance_loss", "balance_loss"), Line("moe/group_balance_loss", "group_balance_loss (inside groups)")),
            ),
            Plot(
                "Rows that the ranks' experts computed",
                "over the mean of the ranks",
                "rank_rows_cv: 0 and rank_rows_max: 1 are even work; all ranks wait for the largest.",
                (Line("moe/rank_rows_max", "rank_rows_max"), Line("moe/rank_rows_cv", "rank_rows_cv")),
                zero=True,
            ),
        ),
    ),
    Section(
        "routers",
        "Routers",
        "Looked at every track.routing_every steps, mean over tokens and layers; z-loss at every step.",
        (
            Plot(
                "Entropy of the router's probabilities",
                "entropy / ln E",
                "router_entropy: 1 does not care; a slow fall is a router that learns, a sudden one a collapse.",
                (Line("moe/router_entropy", "router_entropy"),),
            ),
            Plot(
                "Margin of the choice",
                "logit",
                "router_margin, last chosen above first unchosen: growing is a surer choice; near 0 rounding decides it.",
                (Line("moe/router_margin", "router_margin"),),
                zero=True,
            ),
            Plot(
                "Overlap with the parent's choice",
                "fraction of the parent's choice",
                "router_parent_overlap: 1 visits copies of all that the parent would choose; falls as the child departs.",
                (Line("moe/router_parent_overlap", "router_parent_overlap"),),
            ),
            Plot(
                "Distinct parents of a token's experts",
                "parents",
                "router_parents: top-k is best, since visiting two copies of one parent adds little while they are alike.",
                (Line("moe/router_parents", "router_parents"),),
            ),
            Plot(
                "Router z-loss",
                "squared logsumexp",
                "z_loss: steady or falling; growth is logits that run away.",
                (Line("moe/z_loss", "z_loss"),),
                scale="auto",
            ),
        ),
    ),
    Section(
        "siblings",
        "Siblings",
        "Experts copied from the same parent: mean cosine over their pairs, looked at every track.siblings_every steps.",
        (
            Plot(
                "Likeness of siblings",
                "cosine",
                "1: the copies are still equal; it falls as they specialise.",
                _SIBLINGS,
            ),
            Plot(
                "Distance of siblings",
                "1 - cosine",
                "Rises from step to step; a flat line means that the copies learn the same thing.",
                _SIBLINGS,
                scale="log",
                distance=True,
            ),
        ),
    ),
    Section(
        "time",
        "Throughput and time",
        "Wall time of rank 0; saving and evaluating are not in it.",
        (
            Plot(
                "Throughput",
                "unmasked tokens a second",
                "tokens_per_second: steady; dips are slow data, a slow machine or a step that was looked at.",
                (Line("tokens_per_second", "tokens_per_second"),),
                zero=True,
                robust=True,
            ),
            Plot(
                "Time of a step and wait for data",
                "seconds",
                "data_seconds: near 0 beside the time of the whole step.",
                (Line("seconds", "whole step"), Line("data_seconds", "data_seconds (wait for data)")),
                zero=True,
                robust=True,
            ),
            Plot(
                "Memory",
                "GiB, fullest rank",
                "memory_gib: the most that was held so far; flat after the first steps.",
                (Line("memory_gib", "memory_gib"),),
                zero=True,
                exact=True,
            ),
            Plot(
                "Phases of a step",
                "seconds",
                "Experts and backward dominate; dispatch and combine are communication. Router to combine: forward alone.",
                draw=_phases,
                wide=True,
            ),
        ),
    ),
)
