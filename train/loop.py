"""The training loop of one worker, to be read from top to bottom."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moexpand.base.errors import Stopped
from moexpand.base.files import disk_errors, write_atomic
from moexpand.conf.compose import to_yaml
from moexpand.conf.schema import TrainCommand
from moexpand.data.loader import PackedData
from moexpand.parallel import cpu, ranks
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.engine import Engine
from moexpand.train import checkpoints, setup
from moexpand.train.checkpoints import Progress
from moexpand.train.display import Display
from moexpand.train.evaluation import HeldOut
from moexpand.train.metrics import EVALUATIONS, METRICS, Table, console_line, step_row
from moexpand.train.preflight import Source
from moexpand.train.schedules import learning_rate
from moexpand.train.signals import StopRequest
from moexpand.train.tracking import Tracker, new_id


def train(config: TrainCommand, source: Source, data: PackedData, here: ranks.Ranks) -> None:
    """Train to `train.steps`, going on from the run folder's newest checkpoint.

    Raises:
        Stopped: a signal asked for it; a checkpoint was saved.
        InputError, EnvironmentFailure: as the sentence says; nothing half-written is left under a final name.
    """
    run = Path(config.run.dir)
    stop = StopRequest()
    engine = setup.build_engine(config, source, here)
    progress, notes = _resume(config, engine, setup.fixed_settings(config, data.fingerprint), run)
    with disk_errors(f"preparing {run}"):
        metrics = Table(run / METRICS, progress.step) if here.main else None
        evaluations = Table(run / EVALUATIONS, progress.step) if here.main else None
        if here.main:
            write_atomic(run / "config.yaml", to_yaml(config))
    display = Display(here.main, config.plain, progress.step, config.train.steps)
    for note in notes:
        display.say(note)
    tracker = Tracker(config.track, run, progress.wandb_id, asdict(config), display.say) if here.main else None
    steps, tokens = config.train.steps, progress.tokens

    held_out = HeldOut(data, config.evaluate.batches, config.train.micro_batch, here) if config.evaluate.every else None

    def evaluate(step: int) -> None:
        if held_out is None or (step % config.evaluate.every and step != steps):
            return
        row = {"step": step, "tokens": tokens, **held_out.evaluate(engine)}
        if evaluations is not None and tracker is not None:
            evaluations.append(row)
            tracker.log(row)
        display.say(f"step {step}/{steps}  held-out loss {row['held_out_loss']:.4f} over {row['held_out_tokens']:,} tokens")

    if progress.step >= steps:
        display.say(f"nothing left to do: {progress.step} of train.steps={steps} steps are done")
    try:
        if progress.step == 0:
            evaluate(0)
        for step in range(progress.step, steps):
            began = time.perf_counter()
            batches = load_batches(data, config, here, step)
            waited = time.perf_counter() - began
            lr = learning_rate(config.optim, step, steps)
            report = engine.step(batches, lr)
            tokens += report.tokens
            seconds = time.perf_counter() - began
            row = step_row(report, step + 1, tokens, lr, seconds, waited, source.architecture.router_n_groups)
            if metrics is not None and tracker is not None:
                metrics.append(row)
                tracker.log(row)
            display.say(console_line(row, steps))
            display.advance(step + 1, f"loss {row['loss']:.4f}")
            last, stopping = step + 1 == steps, stop.anywhere()
            evaluate(step + 1)
            if last or stopping or (config.save.every and (step + 1) % config.save.every == 0):
                progress = replace(progress, step=step + 1, tokens=tokens)
                display.say(f"saved {checkpoints.save(engine, run, progress, config.save.keep)}")
            if stopping and not last:
                raise Stopped(
                    f"Stopped by a signal after step {step + 1} of {steps}; a checkpoint is saved, start again to go on."
                )
    finally:
        display.close()
        for table in (metrics, evaluations):
            if table is not None:
                table.close()
        if tracker is not None:
            tracker.finish()


def load_batches(data: PackedData, config: TrainCommand, here: ranks.Ranks, step: int) -> list[PackedBatch]:
    """This data rank's micro-batches of a step, on the device."""
    arrays = data.batch(step, here.data_rank, here.data_size, config.train.micro_batch)
    return [PackedBatch.from_arrays(each, cpu.device()) for each in arrays]


def _resume(config: TrainCommand, engine: Engine, fixed: dict[str, Any], run: Path) -> tuple[Progress, list[str]]:
    """Load the checkpoint to go on from, if there is one; rank 0 chooses for all."""

    def chosen() -> Any:
        try:
            return checkpoints.choose(run, config.run.resume)
        except Exception as error:
            return error

    answer = ranks.broadcast(chosen() if engine.ranks.main else None)
    if isinstance(answer, Exception):
        raise answer
    folder, notes = answer
    if folder is None:
        return Progress(0, 0, fixed, ranks.broadcast(new_id())), notes
    progress = checkpoints.read_progress(folder)
    checkpoints.check_unchanged(progress, fixed, folder)
    checkpoints.checkpoint.load(engine, folder)
    return progress, [*notes, f"going on from {folder} (step {progress.step})"]
