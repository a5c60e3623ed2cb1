"""`moexpand upcycle`: expand a parent checkpoint into a child."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import refuse_existing, refuse_inside, write_atomic
from moexpand.conf.schema import UpcycleCommand
from moexpand.console import Console
from moexpand.upcycle.calibration import Calibration, read_calibration
from moexpand.upcycle.checkpoint import Checkpoint, open_checkpoint
from moexpand.upcycle.crew import default_workers
from moexpand.upcycle.forecast import Forecast, forecast
from moexpand.upcycle.inits import Init
from moexpand.upcycle.meter import duration, metered
from moexpand.upcycle.plan import Plan, check_plan, read_plan, row_per_line
from moexpand.upcycle.planner import Wishes, check_map, make_plan
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.vocabulary import growth_for
from moexpand.upcycle.writer import expand

FREE_WITH_A_PLAN = (
    "source", "target", "calibration", "tokenizer", "max_shard_size", "workers", "reflink", "resume", "dry_run", "plan",
    "plan_out", "plain", "debug",
)  # fmt: skip
"""Keys that say how to write and not what."""


def run(config: UpcycleCommand, given: Sequence[str] = ()) -> None:
    """Plan, say what will be written and what it will be, write it; `given` has the keys of the command line."""
    console = Console(config.plain)
    source, target = Path(config.source), Path(config.target)
    _check_target(config, source, target)
    parent = open_checkpoint(source)
    calibration = None if config.calibration is None else read_calibration(Path(config.calibration))
    plan = _new_plan(config, parent, calibration) if config.plan is None else _given_plan(config, given, parent, calibration)
    recipe = Recipe(parent, plan, config.plan or "The plan", _path(config.tokenizer))
    outlook = forecast(recipe, target, config.max_shard_size, config.workers, calibration, probe=config.dry_run)
    _show(console, config, recipe, outlook)
    if config.plan_out is not None:
        write_atomic(Path(config.plan_out), row_per_line(plan.to_json() | outlook.remarks()))
        console.line(f"The plan is in {config.plan_out}; plan={config.plan_out} follows it.")
    if config.dry_run:
        console.line(f"Nothing was written to {target} (dry_run=true).")
        return
    with metered("expanding", outlook.layout.nbytes, config.plain) as meter:
        summary = expand(
            recipe,
            target,
            max_shard_size=config.max_shard_size,
            workers=config.workers,
            reflink=config.reflink,
            resume=config.resume,
            progress=meter,
            found=meter.found,
            say=console.line,
        )
    resumed = f" ({summary.resumed} were finished before)" if summary.resumed else ""
    shared = f", {summary.shared:,} shared by reflinks" if summary.shared else ""
    console.line(
        f"Wrote {summary.tensors:,} tensors in {_shards(summary.shards)}{resumed}: {summary.bytes_read:,} bytes read, "
        f"{summary.bytes_written:,} written{shared} in {summary.seconds:,.1f} s "
        f"({summary.bytes_written / max(summary.seconds, 1e-9) / 1e6:,.0f} MB/s)."
    )
    console.line(f"Prove it with: moexpand verify source={source} target={target}")


def _check_target(config: UpcycleCommand, source: Path, target: Path) -> None:
    """The target is free, and the source stays as it is."""
    refuse_inside(target, source)
    if config.plan_out is not None:
        out = Path(config.plan_out)
        if any(out.resolve().is_relative_to(folder.resolve()) for folder in (source, target)):
            raise InputError(f"plan_out={out} lies in the source or the target; choose a file beside them.")
        if out.exists():
            read_plan(out)  # only a plan may be replaced
    if not config.resume:
        refuse_existing(target)


def _given_plan(config: UpcycleCommand, given: Sequence[str], parent: Checkpoint, calibration: Calibration | None) -> Plan:
    """The plan of the file, which no key may contradict."""
    where = str(config.plan)
    plan = read_plan(Path(where))
    layout = parent.experts_layout if config.experts_layout == "same" else config.experts_layout
    for field in (field for field in fields(UpcycleCommand) if field.name not in FREE_WITH_A_PLAN):
        value = layout if field.name == "experts_layout" else getattr(config, field.name)
        planned = getattr(plan, field.name, field.default)
        if value not in (None, planned) and (getattr(config, field.name) != field.default or field.name in given):
            said = f"has {field.name}={planned}" if hasattr(plan, field.name) else "says what the child is"
            shown = str(value).lower() if isinstance(value, bool) else value
            raise InputError(
                f"{field.name}={shown} was given, but plan={where} {said}; leave {field.name} out or make another plan."
            )
    check_plan(parent, plan, where)
    check_map(parent, plan, where, calibration)
    if config.tokenizer is not None:
        rows = parent.architecture.vocab_size
        size = rows if plan.vocabulary is None else plan.vocabulary.size
        if growth_for(parent.folder, rows, Path(config.tokenizer), size) != plan.vocabulary:
            raise InputError(f"tokenizer={config.tokenizer} is not the one that plan={where} was made with; give that one.")
    return plan


def _new_plan(config: UpcycleCommand, parent: Checkpoint, calibration: Calibration | None) -> Plan:
    """A plan by the keys."""
    rows = parent.architecture.vocab_size
    init = Init(
        kind=config.init,
        drop_fraction=config.drop_fraction,
        drop_shared=config.drop_shared,
        keep_first=config.keep_first,
        router_noise=config.router_noise or 0.0,
        expert_noise=config.expert_noise,
        seed=config.seed,
    )
    return make_plan(
        parent,
        Wishes(
            num_experts=config.num_experts,
            num_groups=config.num_groups,
            placement=config.placement,
            calibration=calibration,
            map=_path(config.map),
            usage=_path(config.usage),
            regroup=config.regroup,
            router_dtype=config.router_dtype,
            experts_layout=config.experts_layout,
            vocabulary=growth_for(parent.folder, rows, _path(config.tokenizer), config.vocab_size, _path(config.vocab_map)),
            init=init,
            default_noise=config.router_noise is None,
        ),
    )


def _show(console: Console, config: UpcycleCommand, recipe: Recipe, outlook: Forecast) -> None:
    """What the child will be and what writing it takes."""
    plan = recipe.plan
    console.line(f"{config.source} -> {config.target}: {recipe.parent.architecture.num_experts} -> {plan.words()}.")
    if plan.vocabulary is not None:
        console.line(f"{plan.vocabulary.summary()}.")
    workers = config.workers or default_workers()
    console.line(
        f"{recipe.parent.nbytes:,} bytes to read, {outlook.layout.nbytes:,} to write in {_shards(len(outlook.layout.sizes))}; "
        f"{outlook.free:,} free on the target's disk; at most {outlook.memory / 2**20:,.0f} MiB of memory with {workers} "
        f"worker{'s' * (workers != 1)}."
    )
    if config.dry_run:
        shards = [(file, size, len(outlook.tensors_of(file))) for file, size in outlook.layout.sizes.items()]
        console.table(("shard", "bytes", "tensors"), shards)
    if outlook.speed is not None and outlook.seconds is not None:
        console.line(
            f"About {duration(max(1, outlook.seconds))}: a probe of the target's disk wrote {outlook.speed / 1e6:,.0f} MB/s "
            "(without reflinks, and if the source is read as fast)."
        )
    console.line(outlook.sentence())
    for warning in [*outlook.warnings, *_warnings(config, recipe, outlook)]:
        console.line(f"WARNING: {warning}")


def _warnings(config: UpcycleCommand, recipe: Recipe, outlook: Forecast) -> list[str]:
    """What depends on this disk and these keys, and so is not part of a plan."""
    found = []
    if config.dry_run and outlook.free < outlook.layout.nbytes:
        found.append("the target's disk has too little free space; the expansion will be refused unless reflinks save enough.")
    if recipe.plan.vocabulary is not None and not recipe.own_side_files:
        found.append("the child's vocabulary is its own, and no tokenizer was given; its folder will hold none.")
    return found


def _shards(count: int) -> str:
    return f"{count} shard{'s' * (count != 1)}"


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
