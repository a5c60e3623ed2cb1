"""The quickstart's last page: its figures in a few lines, and one picture."""

import json
import statistics
from pathlib import Path
from typing import Any

from moexpand.base.errors import CheckFailed, InputError

Rows = list[dict[str, Any]]


LEARNT = 1.0
"""Nats that the parent must be below the entropy of token frequencies: then its routing is not random."""


def summarise(folder: Path) -> None:
    """Print the figures of a finished quickstart and draw `summary.png` beside its outputs.

    Raises:
        CheckFailed: the parent has not learnt, or the child has not become better since step 0.
    """
    parent, child, continued = (_evaluations(folder / f"{run}-run") for run in ("parent", "child", "continued"))
    steps = _rows(folder / "child-run" / "metrics.jsonl")
    picture = folder / "summary.png"
    _draw(child, continued, steps, picture)
    unigram, before = parent[-1]["unigram_entropy"], parent[-1]["held_out_loss"]
    first, last, beside = child[0]["held_out_loss"], child[-1]["held_out_loss"], continued[-1]["held_out_loss"]
    speed = statistics.median(row["tokens_per_second"] for row in steps)
    load = steps[-1]
    print("\nQuickstart: held-out losses in nats per token")
    print(f"  parent, 128 experts      {before:.4f}  ({unigram - before:.2f} below the {unigram:.2f} of token frequencies alone)")
    print(f"  child at step 0          {first:.4f}  ({first - before:+.4f}: the price of the placement)")
    print(f"  child after {child[-1]['step']:>3} steps    {last:.4f}  ({last - first:+.4f} since step 0)")
    print(f"  parent, as many steps on {beside:.4f}  (the child is {last - beside:+.4f} from it)")
    print(f"  child on two ranks: {speed:,.0f} tokens a second (median), {steps[-1]['tokens']:,} tokens")
    print(
        f"  expert load at the end: largest {load['moe/load_max']:.1f}x the mean, spread inside groups "
        f"{load['moe/group_load_cv']:.2f}, {load['moe/dead_experts']:.1%} without a token"
    )
    print(f"  the trained child: {folder / 'trained'}   runs: {folder}/*-run   picture: {picture}")
    if not before <= unigram - LEARNT:
        raise CheckFailed(f"The parent's loss {before:.4f} is not {LEARNT} nats below the {unigram:.4f} of token frequencies.")
    if not last < first:
        raise CheckFailed(f"The child's loss went from {first:.4f} at step 0 to {last:.4f}.")


def _rows(path: Path) -> Rows:
    if not path.exists():
        raise InputError(f"{path} is missing; run the quickstart's stages first.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise InputError(f"{path} is empty; remove {path.parent} and run the quickstart again.")
    return rows


def _evaluations(run: Path) -> Rows:
    return _rows(run / "evaluations.jsonl")


def _draw(child: Rows, continued: Rows, steps: Rows, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, load) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    loss.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="0.8", label="child, training batches")
    for rows, label in ((child, "child, held-out"), (continued, "parent continued, held-out")):
        loss.plot([row["step"] for row in rows], [row["held_out_loss"] for row in rows], marker="o", label=label)
    loss.set(xlabel="step", ylabel="nats per token", title="Loss")
    for name, label in (("moe/load_max", "largest over mean"), ("moe/group_load_cv", "spread inside groups")):
        load.plot([row["step"] for row in steps], [row[name] for row in steps], label=label)
    load.set(xlabel="step", title="Load over the child's 512 experts", ylim=(0, None))
    for axes in (loss, load):
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
