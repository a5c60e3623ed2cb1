"""Expansions of one small parent by every kind of init, and a record of the bytes that are read."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.plan import Plan
from moexpand.upcycle.planner import Wishes, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.vocabulary import growth_for
from moexpand.upcycle.writer import expand

EXPERTS, SLOTS, GROUPS, LAYERS, VOCABULARY, GROWN = 8, 32, 4, 2, 48, 56
SIZES: dict[str, Any] = {"experts": EXPERTS, "top_k": 4, "layers": LAYERS, "dense": (), "vocab": VOCABULARY}
"""What `tests.upcycle.families.make` is told of the parent."""

INITS: dict[str, dict[str, Any]] = {
    "exact copies": {"placement": "random_balanced"},
    "router noise": {},  # the defaults: quarters_spread and 5 %
    "fp32 router": {"init": Init(router_noise=1e-4, seed=2), "default_noise": False, "router_dtype": "float32"},
    "expert noise": {"init": Init(expert_noise=0.02, seed=3), "placement": "block"},
    "drop, shared units": {"init": Init(kind="drop", seed=4), "placement": "halves_bits"},
    "drop, units of their own": {"init": Init(kind="drop", drop_shared=False, drop_fraction=0.3), "placement": "block_spread"},
    "no exact copy": {"init": Init(kind="drop", expert_noise=0.02, keep_first=False)},
    "vocabulary": {"init": Init(expert_noise=0.02)},
}
"""Wishes by what they show."""


def plan_of(parent: Path, init: str) -> Plan:
    """The plan of a child of 32 experts in 4 groups; maps differ between layers for most placements."""
    opened, wishes = open_checkpoint(parent), dict(INITS[init])
    if init == "vocabulary":
        file = parent.with_name(f"{parent.name}_ids.json")
        file.write_text(json.dumps([*range(VOCABULARY - 1, 4, -1), *[None] * (GROWN - VOCABULARY + 5)]))
        wishes["vocabulary"] = growth_for(parent, VOCABULARY, vocab_map=file)
    return make_plan(opened, Wishes(num_experts=SLOTS, num_groups=GROUPS, **wishes))


def write_child(parent: Path, plan: Plan, folder: Path, layout: str) -> Path:
    """Write the child with experts in this layout."""
    expand(Recipe(open_checkpoint(parent), replace(plan, experts_layout=layout)), folder, workers=1)
    return folder


@contextmanager
def recorded_reads() -> Iterator[list[tuple[str, int, int]]]:
    """File, first byte and end of everything that is read at a place of its own (`os.preadv`) inside the body."""
    reads: list[tuple[str, int, int]] = []
    plain = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        count = plain(descriptor, buffers, offset, *flags)
        reads.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, offset + count))
        return count

    os.preadv = preadv
    try:
        yield reads
    finally:
        os.preadv = plain


def expert_bytes(parent: Path, reads: list[tuple[str, int, int]]) -> dict[tuple[int, int], int]:
    """How many bytes of each of the parent's experts (layer, expert) the reads brought, those that came twice counted twice."""
    found: Counter[tuple[int, int]] = Counter()
    for info in open_checkpoint(parent).tensors.values():
        prefix, experts, ending = info.name.partition(".mlp.experts.")
        if not experts:
            continue
        owners = [int(ending.split(".")[0])] if ending[0].isdigit() else range(EXPERTS)
        size = info.nbytes // len(owners)
        for place, expert in enumerate(owners):
            start = info.start + place * size
            for file, first, end in reads:
                shared = min(end, start + size) - max(first, start)
                if shared > 0 and Path(file) == info.file.resolve():
                    found[int(prefix.rpartition(".")[2]), expert] += shared
    return dict(found)


def needed_bytes(parent: Path, plan: Plan, slots: range) -> dict[tuple[int, int], int]:
    """Bytes of the experts that these slots copy, each once."""
    arch = open_checkpoint(parent).architecture
    size = 3 * arch.hidden_size * arch.moe_intermediate_size * {"bfloat16": 2, "float32": 4}[arch.dtype]
    return {(layer, row[slot]): size for layer, row in enumerate(plan.slot_to_parent) for slot in slots}
