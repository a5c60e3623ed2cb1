"""`moexpand count`: parameters by part, in all and active per token."""

import json
from dataclasses import asdict

from moexpand.conf.schema import CountCommand
from moexpand.console import Console
from moexpand.upcycle.count import count, shape_of


def run(config: CountCommand) -> None:
    """Print the count as a table or as JSON."""
    arch = shape_of(config.model)
    result = count(arch)
    if config.format == "json":
        print(json.dumps({"model": config.model, **asdict(result), "architecture": asdict(arch)}, indent=2))
        return
    rows: list[tuple[str, int, int]] = [(part, number, result.active_parts[part]) for part, number in result.parts.items()]
    rows.append(("total", result.total, result.active))
    rows.append(
        (
            "total without the embedding table",
            result.total - (result.active - result.active_without_embedding),
            result.active_without_embedding,
        )
    )
    Console(plain=True).table(("part", "parameters", "active per token"), rows, title=config.model)
