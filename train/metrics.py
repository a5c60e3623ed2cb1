"""What a step leaves behind: a row in metrics.jsonl (evaluations.jsonl for held-out losses), a line for the reader.

`moe/*` is computed from the token copies that were really dispatched (n_e of each layer, over the whole global batch).
"""

import math
from typing import Any

import torch

from moexpand.data.loader import PackedData
from moexpand.parallel.engine import StepReport
from moexpand.parallel.optimizer import Rates
from moexpand.train.checkpoints import Progress


def load_metrics(dispatched: torch.Tensor, groups: int) -> dict[str, float]:
    """Load over the experts of [layers, experts] counts, averaged over the layers.

    * `load_cv`: standard deviation over mean; `group_load_cv`: inside groups.
    * `load_max`: largest over mean; `group_load_max`: over the mean of the group (the worst of a layer).
    * `load_entropy`: entropy of the load over its largest possible value, 1 when uniform.
    * `dead_experts`: fraction of experts without a token.
    """
    layers, experts = dispatched.shape
    mean = dispatched.mean(1, keepdim=True).clamp(min=1e-12)
    grouped = dispatched.view(layers, groups, -1)
    group_mean = grouped.mean(2, keepdim=True).clamp(min=1e-12)
    share = dispatched / dispatched.sum(1, keepdim=True).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-300).log()).sum(1) / math.log(experts)
    return {
        "moe/load_cv": float((dispatched.std(1, unbiased=False) / mean[:, 0]).mean()),
        "moe/group_load_cv": float((grouped.std(2, unbiased=False) / group_mean[..., 0]).mean()),
        "moe/group_load_max": float((grouped.amax(2) / group_mean[..., 0]).amax(1).mean()),
        "moe/load_max": float((dispatched.amax(1) / mean[:, 0]).mean()),
        "moe/load_entropy": float(entropy.mean()),
        "moe/dead_experts": float((dispatched == 0).double().mean()),
    }


def rank_metrics(rank_rows: torch.Tensor) -> dict[str, float]:
    """Spread of the rows that the ranks' experts computed in a step: standard deviation, and largest, over the mean."""
    mean = rank_rows.mean().clamp(min=1e-12)
    return {
        "moe/rank_rows_cv": float(rank_rows.std(unbiased=False) / mean),
        "moe/rank_rows_max": float(rank_rows.max() / mean),
    }


def step_row(
    report: StepReport,
    progress: Progress,
    rates: Rates,
    seconds: float,
    data_seconds: float,
    groups: int,
) -> dict[str, Any]:
    """One step's row of metrics.jsonl, numbers in full precision.

    Args:
        progress: steps done and unmasked tokens trained on, this step included.
        seconds: wall time of the step, the wait for data included.
        data_seconds: the wait for data.
    """
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": rates.decoder,
        "router_lr": rates.decoder if rates.routers is None else rates.routers,
        "tokens_per_second": report.tokens / seconds,
        "seconds": seconds,
        "data_seconds": data_seconds,
        "skipped": int(bool(report.skipped)),
        "moe/balance_loss": float(report.balance.mean()),
        **({"moe/group_balance_loss": float(report.group_balance.mean())} if report.group_balance.any() else {}),
        "moe/z_loss": float(report.z_loss.mean()),
        **rank_metrics(report.rank_rows),
        **load_metrics(report.dispatched, groups),
    }


def source_row(data: PackedData, step: int) -> dict[str, Any]:
    """What the data of a step was: for each source its tokens in the global batch, and how often it has been read so far."""
    tokens = {f"tokens/{name}": count for name, count in data.tokens_of(step - 1).items()}
    return tokens | {f"epoch/{name}": epochs for name, epochs in data.epochs_at(step).items()}


def evaluation_line(row: dict[str, float], step: int, steps: int) -> str:
    """A held-out loss for the reader, with the parent's where it is known."""
    loss, parent = row["held_out_loss"], row.get("parent_loss")
    beside = "" if parent is None else f"  parent's {parent:.4f} ({loss - parent:+.4f})"
    return f"step {step}/{steps}  held-out loss {loss:.4f}{beside}"


def console_line(row: dict[str, Any], steps: int) -> str:
    """A row for the reader."""
    skipped = "  SKIPPED" if row["skipped"] else ""
    counted = f"{row['step']:>{len(str(steps))}}/{steps}"
    return (
        f"step {counted}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s  data {row['data_seconds']:.2f}s  mem {row['memory_gib']:.1f}G  "
        f"load max {row['moe/load_max']:.1f}x cv {row['moe/load_cv']:.2f}{skipped}"
    )
