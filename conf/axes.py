"""Words of a sweep: which keys get several values, and which values, in Hydra's grammar: `a,b`, `choice(a,b)`, `range(0,4)`,
`interval(1e-6,1e-4)` and `tag(log,interval(...))`.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.errors import HydraException

from moexpand.base.errors import InputError


@dataclass(frozen=True)
class Axis:
    """A key of a sweep.

    Attributes:
        key: the key, or the group.
        values: what it may be, as words of a command line; empty for an interval.
        interval: the two ends, where Optuna chooses between them.
        logarithmic: the interval is searched by its logarithm.
    """

    key: str
    values: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None
    logarithmic: bool = False

    @property
    def first(self) -> str:
        """A value that it can have, as a word of a command line."""
        value = self.values[0] if self.interval is None else f"{self.interval[0]:g}"
        return f"{self.key}={value}"


def split_axes(overrides: list[str]) -> tuple[list[str], list[Axis]]:
    """Take the axes out of the words of a command line.

    Returns:
        The words that stay the same at all points, and the axes in their order.

    Raises:
        InputError: a sweep of a kind that there is not, or the same key twice.
    """
    fixed: list[str] = []
    axes: list[Axis] = []
    for text in overrides:
        axis = _axis(text)
        if axis is None:
            fixed.append(text)
        elif any(axis.key == other.key for other in axes):
            raise InputError(f"{axis.key} has several values twice; give them in one word.")
        else:
            axes.append(axis)
    return fixed, axes


def combinations(axes: list[Axis]) -> Iterator[tuple[str, ...]]:
    """Every combination of the axes' values, the last axis fastest, as words of a command line.

    Raises:
        InputError: an axis is an interval, which has no end of values.
    """
    for axis in axes:
        if axis.interval is not None:
            raise InputError(
                f"{axis.key} is an interval, from which sweep=optuna chooses; give its values one by one, or sweep=optuna."
            )
    for values in itertools.product(*(axis.values for axis in axes)):
        yield tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))


def point_name(words: tuple[str, ...]) -> str:
    """A folder's name for a point: `optim.lr_1e-05__seed_1`."""
    return re.sub(r"[^\w.=+-]+", "-", "__".join(words)).replace("=", "_").strip("-") or "only"


def _axis(text: str) -> Axis | None:
    """The axis that a word is, if it is one. A value that Hydra cannot read is text, which other places know how to quote."""
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    if not override.is_sweep_override():
        return None
    value = override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        return Axis(override.key_or_group, (), (float(value.start), float(value.end)), "log" in value.tags)
    if not (override.is_choice_sweep() or override.is_range_sweep()) or not isinstance(value, Sweep):
        raise InputError(f"{text} is a kind of sweep that there is not; give values with commas, range(...) or interval(...).")
    return Axis(override.key_or_group, tuple(override.sweep_string_iterator()))
