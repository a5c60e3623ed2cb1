"""`moexpand count`: parameters by part, in all and active per token."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from moexpand.conf.schema import CountCommand
from moexpand.console import Console
from moexpand.upcycle.count import BF16, TEXT, TOWERS, Count, Stored, count, stored
from moexpand.upcycle.family import FUSED, SPLIT
from moexpand.upcycle.models import Model, find_model
from moexpand.upcycle.plan import row_per_line

WIDTH = 100
LAYOUTS = {SPLIT: "one by one", FUSED: "stacked"}


def run(config: CountCommand) -> None:
    """Print the count as a table or as JSON."""
    model = find_model(config.model)
    counted = count(model)
    files = None if model.checkpoint is None else stored(model.checkpoint)
    if config.format == "json":
        print(row_per_line(_json(model, counted, files)), end="")
        return
    console = Console(plain=True)
    console.table(
        ("part", "parameters", "active per token", "in a layer"),
        _rows(counted),
        title=f"{model.name} ({model.architecture.model_type})",
    )
    if files is not None:
        stored_rows = [(dtype, *numbers.values()) for dtype, numbers in files.dtypes.items()]
        console.line("")
        console.table(("stored as", "tensors", "numbers", "bytes"), stored_rows)
    console.line("")
    for remark in _remarks(model, counted, files):
        console.line(textwrap.fill(remark, WIDTH, subsequent_indent="  "))


def _json(model: Model, counted: Count, files: Stored | None) -> dict[str, Any]:
    return {
        "model": model.name,
        "kind": model.kind,
        **asdict(counted),
        "bytes_bf16": counted.total * BF16,
        "stored": None if files is None else asdict(files),
        "architecture": asdict(model.architecture),
    }


def _rows(counted: Count) -> list[tuple[str, int, int | None, int | None]]:
    """Parts that there are, then sums."""
    layer = {part: number for kind in counted.layers for part, number in kind.parts.items()}
    rows: list[tuple[str, int, int | None, int | None]] = [
        (part, counted.parts[part], counted.active_parts[part], layer.get(part)) for part in TEXT if counted.parts[part]
    ]
    towers = [(_words(tower), counted.parts[tower], None, None) for tower in TOWERS if counted.parts[tower]]
    text, table = counted.subtotals["text"], counted.active - counted.active_without_embedding
    rows.append(("text decoder" if towers else "total", text, counted.active, None))
    if table:
        rows.append(("  without the embedding table", text - table, counted.active_without_embedding, None))
    return [*rows, *towers, ("total", counted.total, None, None)] if towers else rows


def _remarks(model: Model, counted: Count, files: Stored | None) -> Iterator[str]:
    arch = model.architecture
    groups = f" in {arch.router_n_groups} groups" if arch.router_n_groups > 1 else ""
    yield (
        f"experts: {arch.num_experts:,}{groups}, top-{arch.num_experts_per_tok}, {counted.per_expert:,} parameters each, "
        f"in {len(arch.moe_layers)} of {arch.num_hidden_layers} layers"
    )
    yield (
        "active: what one token of text uses, all of the decoder but the experts that it does not visit; the embedding table "
        "counts in full, or, as a look-up of one row, not at all"
    )
    if arch.tie_word_embeddings:
        yield "head: shares the embedding's weights; active counts them once"
    for tower in TOWERS:
        if counted.parts[tower]:
            yield f"{_words(tower)}: a tower, which sees no text; in the total and not in active"
    if counted.buffers:
        yield f"buffers: {counted.buffers:,} numbers that are saved and not trained; in no sum"
    yield f"bytes: {counted.total * BF16:,} in bf16"
    if files is not None:
        yield f"stored: {files.nbytes:,} bytes of tensors, shards: {files.shards}, experts {LAYOUTS[files.experts_layout]}"
        if files.scales:
            yield f"scales: {files.scales:,} numbers, one for every FP8 block; in no sum"


def _words(name: str) -> str:
    return name.replace("_", " ")
