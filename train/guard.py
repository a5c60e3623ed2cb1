"""Which steps are not taken: losses and gradient norms that leap up, and runs that do nothing else any more.

Numbers that are not finite are refused by the engine itself. Everything here follows from figures that are the same on every
rank, so that all ranks decide alike.
"""

import math
import statistics
from dataclasses import dataclass, field

from moexpand.base.errors import CheckFailed
from moexpand.conf.train_schema import Guard as Settings

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST = {"loss": 0.005, "gradient norm": 0.05}
"""Deviation that is assumed at least: of the loss as a part of its median, of the norm's logarithm as it is."""


@dataclass
class History:
    """Figures of the last steps that were taken, and how many in a row were not; kept in the checkpoints."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: int = 0


class Guard:
    """Judges one step after the other.

    A step leaps when its loss, or the logarithm of its gradient norm, is more than `deviations` robust standard deviations
    (1.4826 times the median absolute deviation) above the median of the last `window` steps that were taken.
    """

    def __init__(self, settings: Settings, history: History) -> None:
        self._settings, self.history = settings, history
        self.warning = ""
        """What `refused` found and let pass."""

    def refused(self, loss: float, grad_norm: float) -> str:
        """Why a step is not to be taken; empty when it is."""
        self.warning = ""
        leap = "" if self._settings.spikes == "off" else self._leap(loss, grad_norm)
        if self._settings.spikes == "warn":
            self.warning, leap = leap, ""
        return leap

    def note(self, step: int, loss: float, grad_norm: float, skipped: str) -> None:
        """Take down what became of a step.

        Raises:
            CheckFailed: too many in a row were skipped.
        """
        history, settings = self.history, self._settings
        if not skipped:
            history.losses = [*history.losses, loss][-settings.window :]
            history.norms = [*history.norms, math.log(max(grad_norm, 1e-30))][-settings.window :]
            history.skipped = 0
            return
        history.skipped += 1
        if history.skipped >= settings.stop_after:
            raise CheckFailed(
                f"{history.skipped} steps in a row were skipped, the last, step {step}, because {skipped}; the run stops without "
                "saving. Look at metrics.jsonl and the data of these steps, then go on from the newest checkpoint with another "
                "optim.lr, guard.spikes or guard.stop_after."
            )

    def _leap(self, loss: float, grad_norm: float) -> str:
        history = self.history
        if len(history.losses) < self._settings.begin:
            return ""
        centre, deviation = _spread(history.losses)
        deviation = max(deviation, LEAST["loss"] * abs(centre))
        if loss > centre + self._settings.deviations * deviation:
            return f"the loss leapt to {loss:.4f} from {centre:.4f} +- {deviation:.4f}"
        centre, deviation = _spread(history.norms)
        deviation = max(deviation, LEAST["gradient norm"])
        if math.log(max(grad_norm, 1e-30)) > centre + self._settings.deviations * deviation:
            return (
                f"the gradient norm leapt to {grad_norm:.4g} from {math.exp(centre):.4g} (a factor of {math.exp(deviation):.2f})"
            )
        return ""


def _spread(values: list[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    centre = statistics.median(values)
    return centre, NORMAL * statistics.median(abs(value - centre) for value in values)
