"""Parts of a run, from a checkpoint and to one, for the tests of resuming."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.parallel import runs
from tests.parallel.runs import Row

RULES = {"gradient": "ste", "balance_coefficient": 1e-3}


@dataclass(frozen=True)
class Leg:
    """Steps first ... last - 1 of a run, from a checkpoint and to one where these are given.

    Attributes:
        folder: of the weights that a run starts from.
        rules, shape: of the router, and changes of the folder's shape.
        forget: a buffer of every layer that is overwritten once the checkpoint is loaded.
    """

    folder: Path
    layout: dict[str, Any]
    precision: str
    first: int
    last: int
    load: Path | None = None
    save: Path | None = None
    rules: dict[str, Any] = field(default_factory=RULES.copy)
    shape: dict[str, Any] | None = None
    forget: str = ""


def legs(several: list[Leg]) -> list[tuple[list[Row], dict[str, np.ndarray]]]:
    """What the steps of each reported, and all weights and buffers of this rank after the last."""
    from moexpand.parallel import checkpoint, ranks

    found = []
    for leg in several:
        with runs.engine(leg.folder, leg.layout, leg.rules, leg.precision, leg.shape) as built:
            runs.prepare(built)
            if leg.load:
                assert checkpoint.load(built, leg.load) == {"step": leg.first}
            for layer in built.moe_layers if leg.forget else ():
                layer.get_buffer(leg.forget).fill_(1.0)
            rows = runs.train(built, leg.first, leg.last)
            state = built.stages[0].state_dict().items()
            found.append((rows, {name: value.double().numpy() for name, value in state if value is not None}))
            if leg.save:
                if built.ranks.main:
                    leg.save.mkdir()
                ranks.barrier()
                checkpoint.save(built, leg.save, {"step": leg.last})
    return found
