"""Counts that add up: everything that enters a stage is kept or dropped for a reason that has a name."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """What went in and what became of it: input = kept + all of dropped."""

    input: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, count: int = 1) -> None:
        """Count things that go on."""
        self.input += count
        self.kept += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Count things that end here."""
        self.input += count
        self.dropped[reason] += count

    def reject(self, reason: str) -> None:
        """Something that was kept ends here after all."""
        self.kept -= 1
        self.dropped[reason] += 1

    def as_json(self) -> dict[str, Any]:
        """For counts.json and dataset.json."""
        return {"input": self.input, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}

    def add(self, other: dict[str, Any]) -> None:
        """Add what `as_json` gave."""
        self.input += other["input"]
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
