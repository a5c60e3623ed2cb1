"""The training loop of one worker, to be read from top to bottom."""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from moexpand.base.errors import Stopped
from moexpand.base.failpoints import failpoint
from moexpand.base.files import write_atomic
from moexpand.conf.compose import to_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.parallel import checkpoint, cpu, ranks
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.engine import Engine
from moexpand.parallel.optimizer import Rates
from moexpand.train import checkpoints, setup
from moexpand.train.batches import Batches
from moexpand.train.checkpoints import Progress
from moexpand.train.display import Display
from moexpand.train.evaluation import HeldOut
from moexpand.train.guard import Guard, History
from moexpand.train.metrics import console_line, evaluation_line, source_row, step_row
from moexpand.train.parent_loss import parent_loss
from moexpand.train.parent_moments import inherited_moments
from moexpand.train.preflight import PLAN, Source
from moexpand.train.provenance import made_by
from moexpand.train.records import Records
from moexpand.train.saving import Saver
from moexpand.train.schedules import decoder_multiplier, learning_rate, router_multiplier
from moexpand.train.signals import StopRequest
from moexpand.train.summary import summary
from moexpand.train.telemetry import Telemetry, telemetry_notes
from moexpand.train.watchdog import Watchdog
from moexpand.upcycle.plan import row_per_line


def train(
    config: TrainCommand, source: Source, data: PackedData, here: ranks.Ranks, stop: StopRequest, watchdog: Watchdog
) -> None:
    """Train to `train.steps`, going on from the run folder's newest checkpoint.

    Raises:
        Stopped: a signal asked for it; a checkpoint was saved.
        CheckFailed: too many steps in a row were skipped, or a weight is not finite; nothing is saved.
        InputError, EnvironmentFailure: as the sentence says; nothing half-written is left under a final name.
    """
    run, steps = Path(config.run.dir), config.train.steps
    parent = parent_loss(config, data, here)
    engine, progress, notes = _start(config, source, data, here)
    held_out = HeldOut(data, config.evaluate.batches, config.train.micro_batch, engine) if config.evaluate.every else None
    with ExitStack() as closed_at_the_end:
        display = closed_at_the_end.enter_context(closing(Display(here.main, config.plain, progress.step, steps)))
        records = closed_at_the_end.enter_context(closing(Records(config, progress, source.expansion, here.main, display.say)))
        if here.main:
            write_atomic(run / "config.yaml", to_yaml(config))
            if source.plan is not None:
                write_atomic(run / PLAN, row_per_line(source.plan.to_json()))
        telemetry = Telemetry(config.track, source, engine)
        for note in [*notes, *data.left_out(), *telemetry_notes(config.track, source)]:
            display.say(note)
        told = {key for met in progress.bad for key in met}
        read = Batches(data, config, here.data_rank, here.data_size, progress.step)
        guard = Guard(config.guard, History(**progress.guard))
        saver = Saver(engine, run, config.save, to_yaml(config), progress.step, records)
        for note in saver.check_space() if progress.step < steps else []:
            display.say(note)

        def interrupted() -> bool:
            watchdog.mark(f"evaluating step {progress.step}")
            failpoint("evaluate")
            return ranks.any_rank(stop.asked)[0]

        to_evaluate = held_out is not None and ranks.broadcast(records.lacks_evaluation(progress.step))
        records.event("started", progress.step, f"training from step {progress.step} to {steps} on {here.world_size} ranks")
        while True:
            # Between two steps: publish what was written meanwhile, save, stop, evaluate.
            watchdog.mark(f"the end of step {progress.step}")
            asked, writes, memory = ranks.largest(stop.asked, saver.writing, cpu.memory_gib())
            stopping, writing = bool(asked), bool(writes)
            saver.poll(writing)
            due = progress.step == steps or (config.save.every and progress.step and progress.step % config.save.every == 0)
            if (stopping or due) and saver.newest != progress.step:
                watchdog.mark(f"saving step {progress.step}")
                progress = replace(progress, bad=_bad_of_all_ranks(data), guard=asdict(guard.history))
                saver.save(progress, wait=stopping or progress.step == steps)
            if stopping and progress.step < steps:
                saver.settle(fatal=True)
                raise Stopped(_stopped(records, progress.step, steps))
            if held_out is not None and to_evaluate and _evaluation_due(config, progress.step):
                found = held_out.evaluate(engine, interrupted)
                if found is None:
                    continue
                found |= {} if parent is None else {"parent_loss": parent}
                records.evaluation({"step": progress.step, "tokens": progress.tokens, **found})
                display.say(evaluation_line(found, progress.step, steps))
            to_evaluate = True
            if progress.step == steps:
                break

            # One step.
            failpoint("step")
            watchdog.mark(f"step {progress.step + 1}, reading its data")
            began = time.perf_counter()
            batches = [PackedBatch.from_arrays(each, cpu.device(), engine.shape, data.pixel_table) for each in next(read)]
            _tell_bad_samples(data, told, display.say if here.main else print)
            watchdog.mark(f"step {progress.step + 1}")
            rates = rates_at(config, progress.step, learning_rate(config.optim, progress.step, steps))
            report = engine.step(batches, rates, watch=telemetry.watch(progress.step + 1), refused=guard.refused)
            watchdog.settle_in()
            progress = replace(progress, step=progress.step + 1, tokens=progress.tokens + report.tokens)
            seconds, groups = time.perf_counter() - began, source.architecture.router_n_groups
            row = step_row(report, progress, rates, seconds, read.waited, groups) | telemetry.row(progress.step, report)
            row["memory_gib"] = memory
            if source.architecture.vision is not None:
                row |= {"tower_lr": rates.tower, "projector_lr": rates.projector}
            if source.architecture.time_series is not None:
                row["time_series_lr"] = rates.time_series
            if here.main:
                row |= source_row(data, progress.step)
            records.step(row)
            display.step(progress.step, console_line(row, steps), f"loss {report.loss:.4f}")
            if report.skipped:
                records.event("skipped", progress.step, f"step {progress.step} is skipped: {report.skipped}", warning=True)
            elif guard.warning:
                records.event("leapt", progress.step, f"step {progress.step}: {guard.warning}", warning=True)
            guard.note(progress.step, report.loss, report.grad_norm, report.skipped)
        records.event("finished", steps, f"all {steps} steps are done")
        for line in summary(run) if here.main else []:
            display.say(line)


def _evaluation_due(config: TrainCommand, step: int) -> bool:
    return step % config.evaluate.every == 0 or step == config.train.steps


def _stopped(records: Records, step: int, steps: int) -> str:
    sentence = f"Stopped by a signal after step {step} of {steps}; a checkpoint is saved, start again to go on."
    records.event("stopped", step, sentence)
    return sentence


def rates_at(config: TrainCommand, step: int, lr: float) -> Rates:
    """The learning rates of all parts at a step (0-based) for which the schedule says `lr`."""
    decoder = lr * decoder_multiplier(config.vision, step)
    return Rates(
        decoder=decoder,
        routers=decoder * router_multiplier(config.router, step),
        tower=lr * config.vision.tower_lr,
        projector=lr * config.vision.projector_lr,
        time_series=lr * config.time_series.lr,
    )


def _tell_bad_samples(data: PackedData, told: set[str], say: Callable[[str], None]) -> None:
    """Name each unreadable sample once, on the rank that met it (ranks other than 0 print to launch.log)."""
    for key in data.bad_samples.keys() - told:
        told.add(key)
        say(f"WARNING: sample {key} is left out: {data.bad_samples[key]}")


def _bad_of_all_ranks(data: PackedData) -> list[dict[str, str]]:
    """Unreadable samples by source, which every rank knows from now on.

    Raises:
        InputError: on all ranks, together they are more than `data.max_bad_fraction` allows.
    """
    for met in ranks.gather(data.bad_by_source):
        data.learn_bad(met)
    return [dict(sorted(bad.items())) for bad in data.bad_by_source]


def _start(config: TrainCommand, source: Source, data: PackedData, here: ranks.Ranks) -> tuple[Engine, Progress, list[str]]:
    """The engine as it stood at the newest checkpoint, or with the weights that the run starts from."""
    fixed, noted = setup.fixed_settings(config, source, data), setup.noted_settings(config, source)
    folder, notes = checkpoints.choose(Path(config.run.dir), config.run.resume, here)
    engine = setup.build_engine(config, source, here)
    notes += setup.layout_notes(config, source)
    if folder is None:
        setup.fill(engine, source, config.seed)
        notes += setup.rounded_routers(config, source)
        engine.prepare_training(setup.adam_of(config))
        notes += inherited_moments(config, source, engine, here)
        return engine, Progress(0, 0, fixed, noted, ranks.broadcast(checkpoints.new_identity()), made_by=made_by()), notes
    progress = checkpoints.read_progress(folder)
    notes += checkpoints.compare(progress, fixed, noted, folder)
    if any(progress.bad):
        data.learn_bad(progress.bad)
        notes.append(f"{sum(map(len, progress.bad))} unreadable samples met before still count for data.max_bad_fraction")
    engine.prepare_training(setup.adam_of(config))
    checkpoint.load(engine, folder)
    notes.append(f"going on from {folder} (step {progress.step} of {config.train.steps})")
    return engine, replace(progress, noted=noted, made_by=made_by()), notes
