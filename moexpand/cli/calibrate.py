"""`moexpand calibrate`: run a parent over shards, in this process or in several, and write how it routes."""

from pathlib import Path

import numpy as np

from moexpand.cli.workers import run_beside
from moexpand.conf.schema import CalibrateCommand
from moexpand.console import Console
from moexpand.train import calibrate
from moexpand.upcycle.calibration import Calibration, LayerCounts, read_calibration

LAUNCHED = "launch.yaml"
COLUMNS = ("layer", "entropy", "effective experts", "max/mean load", "unused", "top-1 weight", "top-k mass")


def run(config: CalibrateCommand) -> int:
    """Check, route, write, and print what was found."""
    console = Console(config.plain)
    job = calibrate.check(config, config.processes)
    _announce(console, config, job)
    if config.processes == 1:
        calibrate.run_worker(config)
    elif code := _run_workers(config):
        return code
    _report(console, read_calibration(Path(config.out)))
    return 0


def _announce(console: Console, config: CalibrateCommand, job: calibrate.Job) -> None:
    architecture = job.checkpoint.architecture
    console.line(
        f"{config.checkpoint}: top-{architecture.num_experts_per_tok} of {architecture.num_experts} experts; "
        f"{job.tokens:,} unmasked tokens in {len(job.loss_tokens):,} sequences of {config.seq_length:,}."
    )
    if job.available < config.tokens:
        console.line(
            f"The shards hold {job.available:,} of the {config.tokens:,} tokens asked for; one pass over them is routed."
        )
    if len(job.sample) < config.sample:
        console.line(f"These are fewer than sample={config.sample:,}; the logits of all of them are kept.")


def _run_workers(config: CalibrateCommand) -> int:
    return run_beside("moexpand.train.calibrate", config, config.processes, calibrate.result_folder(config), LAUNCHED)


def _report(console: Console, found: Calibration) -> None:
    """A line for each layer; weights and mass are means over the sample."""
    rows = []
    for layer, counts in found.layers.items():
        entropy = _entropy(counts)
        load = float(counts.usage.max() / counts.usage.mean())
        weight, mass = _weights(found.logits(layer), found.top_k, found.num_groups)
        unused = int((counts.usage == 0).sum())
        rows.append((layer, f"{entropy:.3f}", f"{np.exp(entropy):.1f}", f"{load:.2f}", unused, f"{weight:.3f}", f"{mass:.3f}"))
    console.table(COLUMNS, rows)
    console.line(
        f"Wrote {found.folder}: counts of {found.tokens:,} tokens and router logits of {found.sample:,} of them "
        f"for {len(found.layers)} layers."
    )


def _entropy(counts: LayerCounts) -> float:
    """Of the experts' shares of the load, in nats; log E when all experts are used alike."""
    shares = counts.usage[counts.usage > 0] / counts.usage.sum()
    return float(-(shares * np.log(shares)).sum())


def _weights(logits_NE: np.ndarray, top_k: int, groups: int) -> tuple[float, float]:
    """Mean over the tokens of the best expert's share of the chosen probability, and of that probability."""
    exponentials = np.exp(logits_NE.astype(np.float64) - logits_NE.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    by_group = np.sort(probabilities.reshape(len(logits_NE), groups, -1), axis=2)[:, :, -(top_k // groups) :]
    mass = by_group.sum((1, 2))
    return float((probabilities.max(1) / mass).mean()), float(mass.mean())
