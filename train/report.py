"""`moexpand report`: one HTML page of one or several runs, from what stands in their folders; no links, no scripts, no torch.

Reads config.yaml, metrics.jsonl, evaluations.jsonl and events.jsonl, also of a run that is still going on.
"""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, read_json, write_atomic
from moexpand.conf.schema import ReportCommand
from moexpand.train.report_events import counted, restarts, shown
from moexpand.train.report_plots import MANY_POINTS, Run, colours, draw, style, to_svg
from moexpand.train.report_sections import SECTIONS
from moexpand.train.tables import EVALUATIONS, EVENTS, METRICS, read_rows, series
from moexpand.upcycle.config_json import read_architecture

PAGE = Path("report", "index.html")
"""Where the page is written in a run folder, unless another place is given."""
CONFIG, PLAN, EXPANSION = "config.yaml", "plan.json", "expansion.json"
HELD_OUT = ("held_out_loss", "parent_loss", "unigram_entropy")
UNREAD = ("step", "tokens", "skipped")
"""Keys of a row that the head tells, and no table of figures."""

# What the head says of a run: a line, and its parts, each left out where the run has no such key.
SETTINGS: dict[str, dict[str, str]] = {
    "starts from": {"checkpoint": "{}", "expand": "expanded by {}"},
    "data": {"data.shards": "{}"},
    "model": {
        "model.num_experts": "{} experts",
        "model.router_n_groups": "groups {}",
        "model.num_experts_per_tok": "top-{}",
        "model.num_hidden_layers": "layers {}",
        "model.hidden_size": "hidden {}",
        "model.moe_intermediate_size": "inside an expert {}",
    },
    "expansion": {"expansion.placement": "{}", "expansion.init": "init {}", "expansion.router_noise": "router noise {}"},
    "length": {
        "train.steps": "steps {}",
        "train.global_batch": "sequences a step {}",
        "train.micro_batch": "a micro-batch {}",
        "train.seq_length": "tokens a sequence {}",
    },
    "optimiser": {
        "optim.lr": "lr {}",
        "optim.min_lr": "min_lr {}",
        "optim.schedule": "{}",
        "optim.warmup_steps": "warm-up {}",
        "optim.decay_steps": "decay {}",
        "optim.clip_grad": "clipped at {}",
    },
    "router": {
        "router.gradient": "gradient {}",
        "router.temperature": "temperature {}",
        "router.lr_multiplier": "lr times {}",
        "router.warmup_steps": "warm-up {}",
        "router.freeze": "frozen {}",
    },
    "balance": {
        "balance.coefficient": "coefficient {}",
        "balance.group_coefficient": "inside groups {}",
        "balance.scope": "scope {}",
        "balance.z_loss": "z-loss {}",
        "balance.selection_bias": "selection bias {}",
    },
    "layout": {
        "launch.processes": "workers {}",
        "parallel.expert": "EP {}",
        "parallel.tensor": "TP {}",
        "parallel.expert_tensor": "ETP {}",
        "parallel.pipeline": "PP {}",
        "parallel.context": "CP {}",
        "parallel.dispatcher": "{}",
        "parallel.recompute": "recompute {}",
    },
    "precision": {"precision.name": "{}"},
    "seed": {"seed": "{}"},
}

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 1240px;
padding: 1em 1.5em; }
h1 { font-size: 1.5em; margin: .2em 0; } h2 { font-size: 1.2em; margin: 2em 0 .2em; border-top: 1px solid #ddd;
padding-top: .8em; }
h3 { font-size: 1em; margin: 0 0 .3em; } p { margin: .2em 0 .8em; color: #555; } nav a { margin-right: 1.2em;
color: #0060a0; }
table { border-collapse: collapse; font-size: .87em; } th, td { padding: .15em .8em .15em 0; text-align: left;
vertical-align: top; }
tr + tr > * { border-top: 1px solid #eee; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums;
white-space: nowrap; }
th { font-weight: 600; } th.run { border-bottom: 3px solid; } td { overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
code { font-size: .95em; overflow-wrap: normal; } details { margin: .6em 0; } summary { cursor: pointer; }
.key { display: inline-block; margin: 0 1.5em .8em 0; font-size: .9em; }
.key i { display: inline-block; width: 1.6em; height: .3em; margin: 0 .4em .2em 0; }
.plots { display: flex; flex-wrap: wrap; gap: 1.6em 2%; }
figure { margin: 0; width: 49%; } figure.wide { width: 100%; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .87em; }
@media (max-width: 800px) { figure { width: 100%; } }
@media print { figure, tr { break-inside: avoid; } nav { display: none; } }
"""


def report(command: ReportCommand, say: Callable[[str], None]) -> None:
    """Write the page of `command.run` and those of `command.compare`.

    Raises:
        InputError: a folder is missing or holds no step, a table or config.yaml is damaged, `out` is no name of a page.
        EnvironmentFailure: reading or writing failed.
    """
    folders = list(dict.fromkeys(Path(name).resolve() for name in [command.run, *command.compare]))
    out = Path(command.out) if command.out is not None else Path(command.run) / PAGE
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise InputError(f"out={out} is not the name of a page; give a file that ends with .html.")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    text, pictures = page(folders, runs)
    with disk_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text)
    say(f"wrote {out}: runs {len(runs)}, steps {max(run.rows[-1]['step'] for run in runs):,}, plots {pictures}")


# ---------------------------------------------------------------- reading


def short_names(folders: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as tell all of them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        names = [_printable("/".join(folder.parts[-length:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


def read_run(folder: Path, name: str) -> Run:
    """What a run wrote down so far.

    Raises:
        InputError: there is no such folder, no step in it, or a file of it is damaged.
    """
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"The run folder {folder} {wrong}; give run.dir of a `moexpand train`.")
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder} holds no {METRICS}, so it is no run folder; give run.dir of a `moexpand train`.")
    rows = read_rows(folder / METRICS)
    if not rows:
        raise InputError(f"{folder / METRICS} holds no step yet; wait for the first one, or start the run.")
    return Run(name, read_settings(folder), rows, read_rows(folder / EVALUATIONS), read_rows(folder / EVENTS))


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml by dotted keys, `model.*` as the checkpoint has it, `expansion.*` of its plan; empty without the file."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    with disk_errors(f"reading {path}"):
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            tree = None
    if not isinstance(tree, dict):
        raise InputError(f"{path} is damaged: it is no YAML of keys; write it anew or remove it.")
    settings = dict(_flat(tree))
    if settings.get("checkpoint") is None:
        return settings | {"checkpoint": "fresh weights"}
    shape = {key for key in settings if key.startswith("model.")} | SETTINGS["model"].keys()
    found = _of_checkpoint(Path(str(settings["checkpoint"])), folder)
    settings = {key: value for key, value in settings.items() if key not in shape}
    return settings | {key: value for key, value in found.items() if key in shape or key.startswith("expansion.")}


def _of_checkpoint(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Shape and expansion of the model that the run started from, as far as its files are still there."""
    found: dict[str, Any] = {}
    try:
        arch = read_architecture(read_json(checkpoint / "config.json"), str(checkpoint))
        found = {f"model.{name}": value for name, value in vars(arch).items()}
    except (InputError, OSError):
        pass
    for path in (folder / PLAN, checkpoint / EXPANSION):
        try:
            plan = read_json(path)
        except (InputError, OSError):
            continue
        if isinstance(plan, dict):
            sizes = {"model.num_experts": plan.get("num_experts"), "model.router_n_groups": plan.get("num_groups")}
            recipe = {f"expansion.{key}": plan.get(key) for key in ("placement", "init", "router_noise")}
            return found | {key: value for key, value in (sizes | recipe).items() if value is not None}
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ---------------------------------------------------------------- the page


def page(folders: Sequence[Path], runs: Sequence[Run]) -> tuple[str, int]:
    """The page, and how many plots it has."""
    sections: list[tuple[str, str, str]] = []
    pictures = 0
    with style():
        for section in SECTIONS:
            figures = []
            for plot in section.plots:
                figure = draw(plot, runs)
                if figure is not None:
                    pictures += 1
                    wide = ' class="wide"' if plot.wide else ""
                    picture = to_svg(figure, pictures, plot.title)
                    caption = f"<figcaption>{_text(plot.good)}</figcaption>"
                    figures.append(f"<figure{wide}><h3>{_text(plot.title)}</h3>{picture}{caption}</figure>")
            if figures:
                body = f'<p>{_text(section.about)}</p>\n{_key(runs)}<div class="plots">\n' + "\n".join(figures) + "\n</div>"
                sections.append((section.anchor, section.title, body))
    sections.insert(0, ("figures", "Figures", _figures(runs)))
    title = _text("moexpand report: " + ", ".join(run.name for run in runs))
    links = "".join(f'<a href="#{anchor}">{_text(heading)}</a>' for anchor, heading, _ in sections)
    parts = [f'<section id="{anchor}">\n<h2>{_text(heading)}</h2>\n{body}\n</section>' for anchor, heading, body in sections]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n<style>{CSS}</style>\n'
        f"</head>\n<body>\n<h1>{title}</h1>\n{_head(folders, runs)}\n<nav>{links}</nav>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    ), pictures


def _head(folders: Sequence[Path], runs: Sequence[Run]) -> str:
    rows = [["run folder", *(f"<code>{_text(folder)}</code>" for folder in folders)]]
    rows.append(["steps", *(_text(_steps(run)) for run in runs)])
    rows.append(["tokens", *(_text(_number(run.rows[-1].get("tokens"))) for run in runs)])
    rows.append(["skipped steps", *(_text(sum(bool(row.get("skipped")) for row in run.rows)) for run in runs)])
    rows.append(["restarts", *(_text(len(restarts(run))) for run in runs)])
    rows.append(["evaluations", *(_text(len(run.evaluations)) for run in runs)])
    for name, parts in SETTINGS.items():
        told = [", ".join(form.format(_value(run.settings[k])) for k, form in parts.items() if _given(run, k)) for run in runs]
        if any(told):
            rows.append([name, *map(_text, told)])
    if not all(run.settings for run in runs):
        rows.append(["settings", *("" if run.settings else f"no {CONFIG} in the folder" for run in runs)])
    return _table(["", *_run_headings(runs)], rows) + _differences(runs) + _events(runs)


def _differences(runs: Sequence[Run]) -> str:
    """All keys whose values are not the same in all runs that have a config.yaml."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings if key != "run.dir"):
        told = [_value(run.settings.get(key, "")) for run in runs]
        if len({value for value, run in zip(told, runs, strict=True) if run.settings}) > 1:
            rows.append([f"<code>{_text(key)}</code>", *map(_text, told)])
    if not rows:
        return ""
    table = _table(["key", *_run_headings(runs)], rows)
    return f"<details open><summary>Keys that differ between the runs: {len(rows)}</summary>{table}</details>"


def _events(runs: Sequence[Run]) -> str:
    """What happened to each run, folded up."""
    parts = []
    for run in runs:
        if run.events:
            cells = [[_text(row.get(key, "")) for key in ("time", "step", "event", "text")] for row in shown(run)]
            name = f" to {_text(run.name)}" if len(runs) > 1 else ""
            table = _table(["time (UTC)", "step", "event", ""], cells)
            parts.append(f"<details><summary>What happened{name}: {_text(counted(run))}</summary>{table}</details>")
    return "".join(parts)


def _figures(runs: Sequence[Run]) -> str:
    """First, last and median value of every figure in every run."""
    shown = dict.fromkeys([*HELD_OUT, *(line.key for section in SECTIONS for plot in section.plots for line in plot.lines)])
    others = sorted({key for run in runs for row in run.rows for key in row} - shown.keys() - {*UNREAD, "loss"})
    rows = []
    for key in ["loss", *shown, *others]:
        cells = []
        for run in runs:
            values = series(run.evaluations if key in HELD_OUT else run.rows, key)[1]
            values = values[np.isfinite(values)]
            cells += [_number(values[0]), _number(values[-1]), _number(np.median(values))] if len(values) else [""] * 3
        if any(cells):
            rows.append([f"<code>{_text(key)}</code>", *map(_text, cells)])
    over = "".join(heading.replace("<th", '<th colspan="3"', 1) for heading in _run_headings(runs))
    names = ["figure", *(['<th class="n">first</th>', '<th class="n">last</th>', '<th class="n">median</th>'] * len(runs))]
    about = "First, last and median finite value."
    if any(len(run.rows) >= MANY_POINTS for run in runs):
        about += " In the plots, faint lines are single steps, strong ones the medians of stretches of a long run."
    return f"<p>{about}</p>" + _table(names, rows, f"<tr><th></th>{over}</tr>" if len(runs) > 1 else "", "n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], above: str = "", kind: str = "") -> str:
    """Cells are HTML; the first of a row is its heading."""
    cell = f'<td class="{kind}">' if kind else "<td>"
    first = "".join(heading if heading.startswith("<th") else f"<th>{heading}</th>" for heading in headings)
    body = "\n".join(f"<tr><th>{row[0]}</th>{''.join(f'{cell}{value}</td>' for value in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead>{above}<tr>{first}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _run_headings(runs: Sequence[Run]) -> list[str]:
    """A run's name over the colour that it has in the plots, where there are several."""
    if len(runs) == 1:
        return [f"<th>{_text(runs[0].name)}</th>"]
    return [
        f'<th class="run" style="border-color:{colour}">{_text(run.name)}</th>'
        for run, colour in zip(runs, colours(len(runs)), strict=True)
    ]


def _key(runs: Sequence[Run]) -> str:
    """Which colour is which run, where there are several."""
    if len(runs) == 1:
        return ""
    pairs = zip(runs, colours(len(runs)), strict=True)
    return "".join(f'<span class="key"><i style="background:{colour}"></i>{_text(run.name)}</span>' for run, colour in pairs)


def _steps(run: Run) -> str:
    planned, done = run.settings.get("train.steps"), run.rows[-1]["step"]
    return f"{done:,} of {planned:,}" if isinstance(planned, int) else f"{done:,}"


def _given(run: Run, key: str) -> bool:
    return run.settings.get(key) is not None


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _text(value: object) -> str:
    return html.escape(_printable(str(value)))
