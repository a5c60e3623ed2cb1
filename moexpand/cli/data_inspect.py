"""`moexpand data inspect`."""

import json
import sys
from pathlib import Path
from typing import Any

from moexpand.conf.schema import DataInspectCommand
from moexpand.console import Console
from moexpand.data.inspect import inspect_shards
from moexpand.data.sheet import write_sheet


def run(config: DataInspectCommand) -> None:
    """Print what a shard folder holds as tables or as JSON."""
    found = inspect_shards(config.shards)
    if config.sheet is not None:
        count = write_sheet(config.shards, Path(config.sheet), config.sheet_samples)
        print(f"{config.sheet}: {count} samples with their pictures and time series", file=sys.stderr)
    if config.format == "json":
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    _print_tables(Console(plain=True), config.shards, found)


def _print_tables(console: Console, shards: str, found: dict[str, Any]) -> None:
    name = found["tokenizer"]["name"]
    console.line(f"{shards}: {found['samples']} samples, {found['tokens']} tokens of {name}, {found['images']} pictures")
    if found["series"]:
        points, rates = found["series_points"], found["series_rates"]
        console.line(
            f"{found['series']} time series: {points['shortest']} to {points['longest']} points, median {points['median']};"
            f" {rates['lowest']:g} to {rates['highest']:g} Hz"
        )
    kinds = [(name, counts["samples"], counts["tokens"]) for name, counts in found["kinds"].items()]
    console.table(("kind", "samples", "tokens"), kinds)
    rows = []
    for stage, counts in found["stages"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
        rows.append((stage, counts["input"], counts["kept"], sum(counts["dropped"].values()), reasons))
    console.table(("stage", "input", "kept", "dropped", "reasons"), rows)
    lengths = found["token_lengths"]
    console.line(f"tokens of a sample: median {lengths['median']}, 90 % below {lengths['p90']}, longest {lengths['longest']}")
    console.table(("sequence length", "fill"), [(int(length), f"{fill:.2%}") for length, fill in found["fill"].items()])
    for example in found["examples"]:
        console.line(f"{example['kind']} {example['key']}: {example['text']}")
