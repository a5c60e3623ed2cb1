"""`moexpand plan`: layouts that fit a cluster, memory of a GPU by part, traffic by link, refusals, a configuration."""

import json
import re
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from moexpand.base.errors import DIFFERENCE, DONE, InputError
from moexpand.base.files import disk_errors, write_atomic
from moexpand.conf.schema import PlanCommand
from moexpand.conf.train_schema import Parallel
from moexpand.console import Console
from moexpand.train.plan_memory import PARTS, Work, stages
from moexpand.train.plan_traffic import NETWORK, NODE
from moexpand.train.planning import EFFICIENCY, GIB, Candidate, Cluster, Refusal, examine, gpu_of
from moexpand.upcycle.count import TOWERS, count
from moexpand.upcycle.models import Model, find_model

WIDTH = 130


def run(config: PlanCommand) -> int:
    """Print the plan; returns 1 when nothing fits."""
    model = find_model(config.model)
    arch = model.architecture
    if len(arch.moe_layers) < arch.num_hidden_layers:
        raise InputError(f"{config.model} has layers without experts, which train does not compute yet.")
    if config.out is not None and Path(config.out).suffix != ".yaml":
        raise InputError(f"out={config.out} is for train's --config-name, which takes .yaml; give out=FOLDER/NAME.yaml.")
    counted = count(model)
    cluster = Cluster(config.nodes, config.gpus_per_node, gpu_of(config.gpu), config.network_gbit * 1e9 / 8)
    pictures = config.pictures if arch.vision is not None else 0.0
    work = Work(
        architecture=arch,
        towers=sum(counted.parts[tower] for tower in TOWERS),
        precision=config.precision,
        seq_length=config.seq_length,
        micro_batch=config.micro_batch,
        global_batch=config.global_batch,
        imbalance=config.imbalance,
        pictures=pictures,
    )
    found, refused = examine(work, cluster, config.parallel)
    limit = cluster.gpu.nbytes - int(config.reserve_gib * GIB)
    fitting = [each for each in found if each.memory.total <= limit]
    if config.out is not None and fitting:
        with disk_errors(f"writing {config.out}"):
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.out), _configuration(config, fitting[0], arch.num_hidden_layers))
    if config.format == "json":
        print(json.dumps(_json(config, fitting, found, refused, limit), indent=1))
        return DONE if fitting else DIFFERENCE
    console = Console(plain=True)
    _head(console, config, model, work, cluster, counted.total, counted.active)
    _layouts(console, fitting or sorted(found, key=lambda each: each.memory.total), config.top, bool(fitting), limit)
    _refused(console, found, fitting, refused)
    if config.out is not None and fitting:
        file = Path(config.out)
        console.line(
            f"the first one is in {file}; go on with moexpand train --config-dir {file.parent} --config-name {file.stem} ..."
        )
    return DONE if fitting else DIFFERENCE


def _head(console: Console, config: PlanCommand, model: Model, work: Work, cluster: Cluster, total: int, active: int) -> None:
    tokens = work.global_batch * work.seq_length
    console.line(f"{model.name}: {total:,} parameters, {active:,} active for a token")
    console.line(
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs ({config.gpu}) of {cluster.gpu.nbytes / GIB:.1f} GiB, "
        f"{config.reserve_gib:g} of them left free; {work.global_batch:,} x {work.seq_length:,} = {tokens:,} tokens a step, "
        f"{work.precision}"
    )
    console.line("")


def _layouts(console: Console, shown: list[Candidate], top: int, fit: bool, limit: int) -> None:
    """The table of layouts: the quickest that fit, or, where none does, the smallest."""
    if not shown:
        return
    best = shown[0].seconds if fit else min(each.seconds for each in shown)
    rows = [
        (
            told(each.parallel),
            *(
                f"{each.memory.total / GIB:.1f}" if part == "total" else f"{getattr(each.memory, part) / GIB:.1f}"
                for part in ("total", *PARTS)
            ),
            f"{each.sent(NODE) / 1e9:.1f}",
            f"{each.sent(NETWORK) / 1e9:.1f}",
            f"{each.seconds / best:.2f}",
        )
        for each in shown[:top]
    ]
    title = "layouts that fit, quickest first" if fit else f"no layout fits into {limit / GIB:.1f} GiB; the smallest"
    console.table(("layout", "GiB", *PARTS, "node GB", "network GB", "time"), rows, title=title)
    console.line("")
    console.line("purposes of the first one's traffic, GB that a GPU sends in a step:")
    for each in shown[0].traffic:
        console.line(f"  {each.nbytes / 1e9:10.2f}  {each.link:<8} {each.purpose}")
    console.line("")
    told_by = (
        "memory: by arithmetic over what the engine keeps, of the fullest GPU; working: what a layer's backward pass or the head "
    )
    told_by += (
        f"needs while it runs. time: a step by nominal rates at {EFFICIENCY:.0%} of the GPU's peak without overlap, to compare "
    )
    told_by += "layouts with, not to predict"
    console.line(textwrap.fill(told_by, WIDTH, subsequent_indent="  "))


def _refused(console: Console, found: list[Candidate], fitting: list[Candidate], refused: list[Refusal]) -> None:
    console.line("")
    console.line(f"{len(fitting)} layouts fit, {len(found) - len(fitting)} are too large, {len(refused)} are refused:")
    kinds = Counter(_kind(each.why) for each in refused)
    for kind, number in kinds.most_common():
        example = next(each for each in refused if _kind(each.why) == kind)
        console.line(textwrap.fill(f"  {number:5}  {example.why} ({told(example.parallel)})", WIDTH, subsequent_indent=" " * 9))


def _kind(why: str) -> str:
    """What a refusal is about: its sentence without the numbers."""
    return re.sub(r"\d[\d,. x]*", "#", why)[:60]


def told(parallel: Parallel) -> str:
    """A layout as people name it."""
    sizes = {
        "TP": parallel.tensor,
        "CP": parallel.context,
        "EP": parallel.expert,
        "ETP": parallel.expert_tensor,
        "PP": parallel.pipeline,
    }
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["DP"]
    if parallel.first_layers or parallel.last_layers:
        words[-1] += f"({parallel.first_layers},..,{parallel.last_layers})"
    if parallel.interleave > 1:
        words.append(f"x{parallel.interleave}")
    if parallel.dispatcher != "alltoall":
        words.append(parallel.dispatcher)
    if parallel.recompute != "none":
        words.append(f"recompute {parallel.recompute}")
    return " ".join(words)


def _json(
    config: PlanCommand, fitting: list[Candidate], found: list[Candidate], refused: list[Refusal], limit: int
) -> dict[str, object]:
    def entry(each: Candidate) -> dict[str, object]:
        return {
            "layout": told(each.parallel),
            "parallel": asdict(each.parallel),
            "bytes": asdict(each.memory) | {"total": each.memory.total},
            "traffic": [asdict(one) for one in each.traffic],
            "seconds_nominal": each.seconds,
        }

    return {
        "model": config.model,
        "limit": limit,
        "fit": [entry(each) for each in fitting[: config.top]],
        "too_large": len(found) - len(fitting),
        "smallest": entry(min(found, key=lambda each: each.memory.total)) if found else None,
        "refused": [{"layout": told(each.parallel), "why": each.why} for each in refused],
    }


def _configuration(config: PlanCommand, first: Candidate, num_layers: int) -> str:
    """A file for `train --config-name`."""
    layers = [stage.layers for stage in stages(num_layers, first.parallel)]
    several = config.nodes > 1
    lines = [
        f"# {told(first.parallel)}: {first.memory.total / GIB:.1f} GiB on the fullest GPU, by moexpand plan.",
        f"# Layers of the stages: {layers}.",
        "defaults:",
        "  - train",
        "  - override precision: " + config.precision,
        *(["  - override launch: slurm"] if several else []),
        "  - _self_",
        "",
        "launch:",
        *([f"  nodes: {config.nodes}"] if several else []),
        f"  processes: {config.gpus_per_node}",
        "train:",
        *(f"  {name}: {getattr(config, name)}" for name in ("global_batch", "micro_batch", "seq_length")),
        "parallel:",
        *(f"  {name}: {json.dumps(value)}" for name, value in asdict(first.parallel).items()),
    ]
    return "\n".join(lines) + "\n"
