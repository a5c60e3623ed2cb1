"""A second opinion on a run's loss at step 0: transformers computes it, each held-out segment alone.

`python -m moexpand.train.reference RUN` shares nothing with the engine but the tokens: other model code, no packing, no
parallelism. It compares with the run's own evaluation at step 0 and fails beyond 1e-4.
"""

import sys
from itertools import pairwise
from pathlib import Path

from moexpand.base.errors import CheckFailed, InputError, MoexpandError
from moexpand.conf.compose import from_yaml
from moexpand.conf.schema import TrainCommand
from moexpand.data.loader import MicroBatch
from moexpand.train.metrics import EVALUATIONS, read_rows
from moexpand.train.preflight import PLAN
from moexpand.train.run_data import open_data

TOLERANCE = 1e-4


def reference_loss(folder: str, batches: list[MicroBatch]) -> float:
    """Loss per unmasked token, in nats, of a Hugging Face folder in fp32, through transformers and the folder's own code."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    total, counted = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for start, stop in pairwise(batch.cu_seqlens.tolist()):
                mask = torch.from_numpy(batch.loss_mask[start:stop]).bool()
                if not mask.any():
                    continue
                logits = model(torch.from_numpy(batch.tokens[None, start:stop])).logits[0]
                losses = torch.nn.functional.cross_entropy(
                    logits.double(), torch.from_numpy(batch.labels[start:stop]), reduction="none"
                )
                total, counted = total + float(losses[mask].sum()), counted + int(mask.sum())
    return total / counted


def compare(run: Path) -> str:
    """Compute the loss at step 0 again and say both.

    Raises:
        CheckFailed: they differ by more than 1e-4.
    """
    config: TrainCommand = from_yaml(run / "config.yaml", "train")
    rows = [row for row in read_rows(run / EVALUATIONS) if row["step"] == 0]
    if config.expand is not None:
        raise InputError(
            f"{run} expanded its parent while it was loaded, and transformers needs a folder: write the child with "
            f"moexpand upcycle plan={run / PLAN} and compare a run that starts from it."
        )
    if not rows or config.checkpoint is None:
        raise InputError(f"{run} holds no evaluation of a checkpoint at step 0; train with checkpoint=... and evaluate.every.")
    ours = rows[0]["held_out_loss"]
    theirs = reference_loss(config.checkpoint, open_data(config).held_out(config.evaluate.batches))
    sentence = f"loss at step 0: {ours:.6f} by the engine, {theirs:.6f} by transformers (difference {abs(ours - theirs):.1e})"
    if not abs(ours - theirs) <= TOLERANCE:
        raise CheckFailed(f"The {sentence} is beyond {TOLERANCE:g}.")
    return sentence


if __name__ == "__main__":
    try:
        print(compare(Path(sys.argv[1])))
    except MoexpandError as error:
        print(f"moexpand: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
