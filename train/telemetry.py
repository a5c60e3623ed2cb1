"""When a run looks at its routers and siblings, and what it compares them with."""

from collections.abc import Mapping

import torch

from moexpand.conf.train_schema import Track
from moexpand.parallel import cpu, phases
from moexpand.parallel.engine import Engine, StepReport
from moexpand.parallel.siblings import similarities
from moexpand.parallel.watch import ParentRouter, RouterWatch
from moexpand.train.preflight import Source
from moexpand.upcycle.checkpoint import EXPANSION
from moexpand.upcycle.families import family_of


class Telemetry:
    """The figures of an expansion beyond its load, at the steps that `track` names.

    Steps are numbered as in metrics.jsonl, from 1; the first step of a run is always looked at.
    """

    def __init__(self, track: Track, source: Source, engine: Engine) -> None:
        self._track, self._engine = track, engine
        self._parent_of = parents_of(source, engine.routed_layers)
        self._parents = parent_routers(source, self._parent_of) if track.routing_every else {}
        self._watch: RouterWatch | None = None

    def watch(self, step: int) -> RouterWatch | None:
        """What looks at the routers during step `step`, if anything does."""
        comparing = self._due(step, self._track.siblings_every) and self._parent_of
        if not self._due(step, self._track.routing_every) and not (comparing and self._track.sibling_outputs):
            self._watch = None
        else:
            self._watch = RouterWatch(self._parents, self._track.sibling_outputs if comparing else 0)
        return self._watch

    def row(self, step: int, report: StepReport) -> dict[str, float]:
        """The figures of a step for metrics.jsonl, mean over the layers; all ranks call it."""
        found: dict[str, torch.Tensor] = {f"router_{name}": values for name, values in report.watched.items()}
        seconds = dict(report.seconds)
        if self._due(step, self._track.siblings_every) and self._parent_of:
            probes = self._watch.probes if self._watch is not None and self._track.sibling_outputs else None
            with phases.measured() as own, phases.timed("siblings"):
                compared = similarities(self._engine, self._parent_of, probes)
            seconds |= own
            found |= {f"sibling_{name}": values for name, values in compared.items()}
        means = {f"moe/{name}": float(values.nanmean()) for name, values in found.items() if not values.isnan().all()}
        return means | {f"time/{name}": value for name, value in seconds.items()}

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return bool(every) and (step == 1 or step % every == 0)


def parents_of(source: Source, layers: list[int]) -> dict[int, torch.Tensor]:
    """The parent of every expert by decoder layer, int64 [E] on the device; empty where the model is no expansion."""
    if source.expansion is None:
        return {}
    maps = source.expansion.slot_to_parent
    return {layer: torch.tensor(maps[layer], device=cpu.device()) for layer in layers if maps[layer]}


def parent_routers(source: Source, parent_of: Mapping[int, torch.Tensor]) -> dict[int, ParentRouter]:
    """The parent's routers, from the child's rows at step 0: of each parent the row of its first slot.

    Expansion keeps that one exact, unless `keep_first=false` put noise on it too.
    """
    if not parent_of or source.checkpoint is None:
        return {}
    found, arch = {}, source.architecture
    for layer, parents in parent_of.items():
        rows_EH = source.checkpoint.read_torch(family_of(arch.model_type).router_name(layer), None).to(torch.float32)
        first = torch.zeros(int(parents.max()) + 1, dtype=torch.int64)
        for slot in reversed(range(len(parents))):
            first[parents[slot]] = slot
        rows_PH = rows_EH[first].to(cpu.device())
        found[layer] = ParentRouter(rows_PH, parents, arch.num_experts_per_tok, source.parent_groups)
    return found


def telemetry_notes(track: Track, source: Source) -> list[str]:
    """A line when a figure has to be left out."""
    if not track.routing_every or source.expansion is None or source.checkpoint is None or source.parent_groups is not None:
        return []
    return [
        f"note: {source.checkpoint.folder / EXPANSION} is of an older version and does not say in how many groups the parent "
        "routes; moe/router_parent_overlap is left out"
    ]
