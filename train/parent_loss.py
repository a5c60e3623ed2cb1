"""The parent's held-out loss, measured once by the same engine on the same samples: what the child is compared with."""

import gc
import json
from contextlib import suppress
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import write_json
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.parallel import ranks
from moexpand.parallel.engine import Engine
from moexpand.parallel.ranks import Ranks
from moexpand.parallel.shape import RouterRules
from moexpand.train import weights
from moexpand.train.evaluation import HeldOut
from moexpand.train.preflight import open_supported
from moexpand.train.setup import layout_of, shape_of
from moexpand.upcycle.logical import StoredWeights

FILE = "parent.json"


def parent_loss(config: TrainCommand, data: PackedData, here: Ranks) -> float | None:
    """The held-out loss of `evaluate.parent` in nats per token; None where no parent is named.

    It is measured before the run's own model is built, on the same layout, and kept in the run folder.
    """
    folder = config.evaluate.parent
    if folder is None or not config.evaluate.every:
        return None
    checkpoint = open_supported(folder)
    what = {"checkpoint": checkpoint.fingerprint, "batches": config.evaluate.batches, "precision": config.precision.name}
    known: float | None = ranks.broadcast(_known(Path(config.run.dir) / FILE, what))
    if known is not None:
        return known
    engine = Engine(shape_of(checkpoint.architecture), layout_of(config.parallel), RouterRules(), config.precision.name, here)
    weights.load(engine, StoredWeights(checkpoint))
    found = HeldOut(data, config.evaluate.batches, config.train.micro_batch, engine).evaluate(engine)
    assert found is not None
    if here.main:
        write_json(Path(config.run.dir) / FILE, {**what, "held_out_loss": found["held_out_loss"]})
    del engine
    gc.collect()  # the engine's parts refer to each other
    return found["held_out_loss"]


def _known(file: Path, what: dict[str, object]) -> float | None:
    """The loss of an earlier start of this run; None where it was of something else."""
    with suppress(OSError, ValueError, InputError):
        found = json.loads(file.read_text(encoding="utf-8"))
        loss = found.pop("held_out_loss")
        return float(loss) if found == what else None
    return None
