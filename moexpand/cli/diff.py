"""`moexpand diff`: two models' configs and derived sizes side by side."""

import json
from dataclasses import asdict
from typing import Any

from moexpand.conf.schema import DiffCommand
from moexpand.console import Console
from moexpand.upcycle.diff import Diff, diff, ratio
from moexpand.upcycle.models import Model, find_model
from moexpand.upcycle.plan import row_per_line

LONGEST = 28
"""Characters of a value in the table; JSON has it whole."""


def run(config: DiffCommand) -> None:
    """Print both models as tables or as JSON; models that differ are no failure."""
    models = {"left": find_model(config.left), "right": find_model(config.right)}
    found = diff(models["left"], models["right"])
    if config.format == "json":
        print(row_per_line(_json(models, found)), end="")
    else:
        _print_tables(Console(plain=True), models, found)


def _json(models: dict[str, Model], found: Diff) -> dict[str, Any]:
    return {
        **{side: {"model": model.name, "kind": model.kind} for side, model in models.items()},
        "descent": None if found.descent is None else asdict(found.descent),
        "equal_keys": found.equal,
        "different_keys": found.keys,
        "sizes": {name: {"left": pair[0], "right": pair[1], "ratio": ratio(pair)} for name, pair in found.sizes.items()},
    }


def _print_tables(console: Console, models: dict[str, Model], found: Diff) -> None:
    for side, model in models.items():
        console.line(f"{side + ':':<7}{model.name} ({model.architecture.model_type})")
    if found.descent is not None:
        parent, child = models[found.descent.parent].name, models[found.descent.child].name
        console.line(
            f"The {found.descent.child} one says that it is an expansion of the {found.descent.parent} one "
            f"({found.descent.placement}); moexpand verify source={parent} target={child} proves it."
        )
    console.line("")
    if found.keys:
        keys = [(key, _value(values, "left"), _value(values, "right")) for key, values in found.keys.items()]
        console.table(("key of config.json", "left", "right"), keys)
    console.line(f"{found.equal} {'other ' if found.keys else ''}keys are equal.")
    console.line("")
    sizes = [(name.replace("_", " "), *pair, _times(ratio(pair))) for name, pair in found.sizes.items() if any(pair)]
    console.table(("size", "left", "right", "right / left"), sizes)


def _value(values: dict[str, Any], side: str) -> str:
    if side not in values:
        return "(none)"
    text = json.dumps(values[side], ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
