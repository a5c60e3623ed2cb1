"""A second opinion on a run's loss at step 0: transformers computes it, each held-out segment alone.

`python -m moexpand.train.reference RUN` shares nothing with the engine but the tokens: other model code, no packing, no
parallelism. It compares with the run's own evaluation at step 0 and fails beyond 1e-4.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moexpand.base.errors import CheckFailed, InputError, MoexpandError
from moexpand.conf.compose import from_yaml
from moexpand.conf.train_schema import TrainCommand
from moexpand.data.images import ImageProcessor, ImageSettings
from moexpand.data.loader import MicroBatch
from moexpand.train.preflight import PLAN
from moexpand.train.run_data import open_data
from moexpand.train.run_inputs import architecture_of
from moexpand.train.tables import EVALUATIONS, read_rows

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4


def reference_loss(folder: str, batches: list[MicroBatch], images: ImageSettings | None = None) -> float:
    """Loss per unmasked token, in nats, of a Hugging Face folder in fp32, through transformers and the folder's own code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if architecture_of(folder).vision is None else AutoModelForImageTextToText
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    total, counted = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            pictures = _Pictures(batch, images)
            for start, stop in pairwise(batch.cu_seqlens.tolist()):
                tokens = torch.from_numpy(batch.tokens[None, start:stop])
                seen = pictures.of_the_next(tokens, model)
                mask = torch.from_numpy(batch.loss_mask[start:stop]).bool()
                if not mask.any():
                    continue
                logits = model(tokens, **seen).logits[0]
                losses = torch.nn.functional.cross_entropy(
                    logits.double(), torch.from_numpy(batch.labels[start:stop]), reduction="none"
                )
                total, counted = total + float(losses[mask].sum()), counted + int(mask.sum())
    return total / counted


class _Pictures:
    """The pictures of a batch, segment by segment, as transformers' models take them."""

    def __init__(self, batch: MicroBatch, images: ImageSettings | None) -> None:
        self._batch, self._images = batch, images
        self._grids = [] if batch.grids is None else batch.grids.tolist()
        self._patch = 0

    def of_the_next(self, tokens: "torch.Tensor", model: Any) -> dict[str, Any]:
        """What a model takes beside the tokens [1, T] of the segment that follows."""
        import torch

        if self._images is None:
            return {}
        placeholders = tokens == model.config.image_token_id
        seen: dict[str, Any] = {"mm_token_type_ids": placeholders.int()}
        features, grids = int(placeholders.sum()), []
        while features:
            grids.append(self._grids.pop(0))
            features -= math.prod(grids[-1]) // self._images.merge_size**2
        if grids:
            assert self._batch.patches is not None
            begin, self._patch = self._patch, self._patch + sum(math.prod(grid) for grid in grids)
            pixels = ImageProcessor(self._images).normalise(self._batch.patches[begin : self._patch])
            seen |= {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.tensor(grids)}
        return seen


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
    data = open_data(config)
    if data.has_series:
        raise InputError(
            f"{run} trains on time series, which transformers does not compute; compare a run with data.time_series=off."
        )
    theirs = reference_loss(config.checkpoint, data.held_out(config.evaluate.batches), data.images)
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
