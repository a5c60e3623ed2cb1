"""`moexpand upcycle`: expand a parent checkpoint into a child."""

from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.base.files import refuse_existing, write_atomic
from moexpand.conf.schema import UpcycleCommand
from moexpand.console import Console
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.meter import Meter
from moexpand.upcycle.plan import make_plan, row_per_line
from moexpand.upcycle.writer import child_layout, expand


def run(config: UpcycleCommand) -> None:
    """Plan, say what will be written, write it."""
    console = Console(config.plain)
    source, target = Path(config.source), Path(config.target)
    refuse_existing(target)
    if config.workers < 0:
        raise InputError(f"workers={config.workers} is impossible; 0 takes one a core.")
    parent = open_checkpoint(source)
    plan = make_plan(
        parent, num_experts=config.num_experts, num_groups=config.num_groups, placement=config.placement, seed=config.seed
    )
    layout = child_layout(parent, plan, config.max_shard_size)
    arch = parent.architecture
    console.line(
        f"{source} -> {target}: {arch.num_experts} -> {plan.num_experts} experts in {plan.num_groups} groups over "
        f"{arch.num_hidden_layers} layers, {plan.placement}; {len(layout.sizes)} shards, {layout.nbytes / 1e9:,.2f} GB."
    )
    if config.plan_out is not None:
        write_atomic(Path(config.plan_out), row_per_line(plan.to_json()))
        console.line(f"The plan is in {config.plan_out}.")
    if config.dry_run:
        console.line("Nothing was written (dry_run=true).")
        return
    meter = Meter("expanding", layout.nbytes, console.line)
    summary = expand(parent, plan, target, max_shard_size=config.max_shard_size, workers=config.workers, progress=meter)
    console.line(
        f"Wrote {summary.tensors:,} tensors in {summary.shards} shards: {summary.bytes_read / 1e9:,.2f} GB read, "
        f"{summary.bytes_written / 1e9:,.2f} GB written in {summary.seconds:,.1f} s "
        f"({summary.bytes_written / summary.seconds / 1e6:,.0f} MB/s)."
    )
    console.line(f"Check it with: moexpand verify source={source} target={target}")
