"""Learning-rate schedules as pure functions of the step."""

import math

from moexpand.conf.train_schema import Optim, Router, Vision


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `steps`.

    All schedules warm up linearly over `warmup_steps`. Then `constant` stays; `cosine` falls to `min_lr` on half a cosine over
    the rest; `wsd` stays until `decay_steps` before the end and falls linearly to `min_lr` (arXiv 2404.06395).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    span = optim.lr - optim.min_lr
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        return optim.min_lr + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if optim.schedule == "wsd" and optim.decay_steps:
        remaining = min(1.0, (steps - step) / (optim.decay_steps + 1))
        return optim.min_lr + span * remaining
    return optim.lr


def router_multiplier(router: Router, step: int) -> float:
    """Learning rate of the routers over that of all else at step `step` (0-based): `lr_multiplier` after a linear warm-up.

    0 where the routers are frozen.
    """
    if router.freeze:
        return 0.0
    return router.lr_multiplier * min(1.0, (step + 1) / max(1, router.warmup_steps))


def decoder_multiplier(vision: Vision, step: int) -> float:
    """0 while tower and projector warm up alone at step `step` (0-based), 1 afterwards; of the decoder and its routers."""
    return float(step >= vision.warmup_steps)
