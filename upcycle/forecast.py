"""What an expansion will take and what its child will be at step 0, told before a byte is written."""

import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moexpand.base.files import disk_errors
from moexpand.upcycle.calibration import Calibration
from moexpand.upcycle.crew import default_workers
from moexpand.upcycle.jobs import Made
from moexpand.upcycle.layout import Layout, existing_parent
from moexpand.upcycle.planner import check_calibration, predict_step_zero, warnings
from moexpand.upcycle.prediction import Prediction
from moexpand.upcycle.probe import LARGEST, write_speed
from moexpand.upcycle.reading import KEPT, PIECE
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import ALIGNMENT
from moexpand.upcycle.writer import child_layout

BASE_MEMORY = 160 << 20
"""Interpreter, libraries and tables of names, measured on parents of up to 100,000 tensors."""


@dataclass(frozen=True)
class Forecast:
    """What is known before writing.

    Attributes:
        layout: the shard table.
        free: bytes free on the target's file system.
        memory: bytes of memory at most.
        speed: bytes a second of the disk probe; None without one.
        prediction: of step 0; None without a calibration.
        warnings: sentences.
    """

    layout: Layout
    free: int
    memory: int
    speed: float | None
    prediction: Prediction | None
    warnings: list[str]

    @property
    def seconds(self) -> float | None:
        """Time that writing takes at the probe's speed."""
        return None if self.speed is None else self.layout.nbytes / self.speed

    @cached_property
    def _by_file(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for name, place in self.layout.tensors.items():
            found[str(place.file)].append(name)
        return found

    def tensors_of(self, file: str) -> list[str]:
        """Names of a shard's tensors."""
        return self._by_file[file]

    def sentence(self) -> str:
        """Step 0 in one line."""
        if self.prediction is None:
            return "Step 0: unknown without a calibration; make one with `moexpand calibrate` and give calibration=FOLDER."
        found = self.prediction
        return (
            f"Step 0, predicted from {len(found.layers)} layers of router logits: {found.gate_mass:.1%} of the parent's gate "
            f"mass kept, {found.distinct:.2f} distinct experts a token, {found.recall:.2f} of the parent's top-k, total "
            f"variation of the combine weights {found.total_variation:.3f}."
        )

    def remarks(self) -> dict[str, Any]:
        """What a plan's file says besides the plan."""
        return {
            "prediction": "unknown" if self.prediction is None else asdict(self.prediction),
            "warnings": self.warnings,
            "output": {"bytes": self.layout.nbytes, "shards": self.layout.sizes},
        }


def forecast(
    recipe: Recipe, target: Path, max_shard_size: str | int, workers: int, calibration: Calibration | None, probe: bool
) -> Forecast:
    """Work out what an expansion takes; with `probe` the target's disk is written to for a second.

    Raises:
        InputError: the calibration is of another parent.
        EnvironmentFailure: the target's disk cannot be looked at or, with `probe`, written to.
    """
    check_calibration(recipe.parent, recipe.plan.parent, calibration)
    layout = child_layout(recipe, max_shard_size)
    folder = existing_parent(Path(target).absolute().parent)
    with disk_errors(f"looking at {folder}"):
        free = shutil.disk_usage(folder).free
    return Forecast(
        layout=layout,
        free=free,
        memory=_memory(recipe, workers),
        speed=_speed(target, free) if probe else None,
        prediction=None if calibration is None else predict_step_zero(recipe.parent, recipe.plan, calibration),
        warnings=warnings(recipe.parent, recipe.plan),
    )


def _speed(target: Path, free: int) -> float | None:
    """Of the target's disk; None when it is so full that nothing can be tried."""
    largest = min(LARGEST, free // 2) // ALIGNMENT * ALIGNMENT
    return write_speed(target, largest) if largest else None


def _memory(recipe: Recipe, workers: int) -> int:
    """Each worker holds a piece, up to four times what is made (read, joined, changed, in order), and what it has read last."""
    vocabulary = (recipe.family.embedding_name(), recipe.family.head)
    made = [
        job.nbytes
        for bundle in recipe.bundles()
        for job in bundle.jobs
        if isinstance(job.content, Made) and bundle.tensors[0] not in vocabulary
    ]
    kept = KEPT * recipe.largest_range if made else 0
    return BASE_MEMORY + (workers or default_workers()) * (PIECE + 4 * max(made, default=0) + kept)
