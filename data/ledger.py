"""What asking models cost: requests, tokens and failures, by route and model."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import write_json
from moexpand.data.caption_cache import Reply


@dataclass
class Tolls:
    """HTTP requests sent, retries included; retries; and why tries failed that were or could have been repeated."""

    requests: int = 0
    retries: int = 0
    troubles: Counter[str] = field(default_factory=Counter)


@dataclass
class RouteLedger:
    """Of one model under one route, in this run.

    Attributes:
        tolls: requests sent.
        answered: jobs with an answer.
        failures: jobs without one, by reason.
        paid: replies that were sent for; bad ones included.
        cached: replies taken from the cache.
        shared: replies that came with those of an equal request under way.
        prompt_tokens, completion_tokens: of the paid replies, as the server counted them.
        uncounted: paid replies without these counts.
        examples: by reason, the first job and what the server said.
    """

    tolls: Tolls = field(default_factory=Tolls)
    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    paid: int = 0
    cached: int = 0
    shared: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    def pay(self, reply: Reply) -> None:
        """Count a reply that was sent for."""
        self.paid += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None

    def as_json(self) -> dict[str, Any]:
        """jobs = answered + all of failures; requests = tries that brought a reply or a refusal + all of troubles."""
        return {
            "jobs": self.answered + self.failures.total(),
            "answered": self.answered,
            "failures": dict(sorted(self.failures.items())),
            "requests": self.tolls.requests,
            "retries": self.tolls.retries,
            "troubles": dict(sorted(self.tolls.troubles.items())),
            "paid": self.paid,
            "cached": self.cached,
            "shared": self.shared,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "uncounted": self.uncounted,
            "examples": dict(sorted(self.examples.items())),
        }


class Ledger:
    """Of one run. `noun` says what is asked for, in the plural: "captions", "scores"."""

    def __init__(self, noun: str = "captions") -> None:
        self.noun = noun
        self.fresh_answers = 0
        self.fresh_failures = 0
        self._routes: dict[tuple[str, str], RouteLedger] = {}

    def answer(self, route: str, model: str, cached: bool) -> None:
        """Count a job with an answer; `cached` when nothing was sent for it."""
        self.of(route, model).answered += 1
        self.fresh_answers += not cached

    def fail(self, route: str, model: str, cached: bool, reason: str, example: str) -> None:
        """Count a job without one; the first example of a reason is kept."""
        part = self.of(route, model)
        part.failures[reason] += 1
        part.examples.setdefault(reason, example)
        self.fresh_failures += not cached

    def of(self, route: str, model: str) -> RouteLedger:
        """The part of one model under one route."""
        return self._routes.setdefault((route, model), RouteLedger())

    @property
    def answered(self) -> int:
        """Jobs with an answer."""
        return sum(part.answered for part in list(self._routes.values()))

    @property
    def failed(self) -> int:
        """Jobs without one."""
        return sum(part.failures.total() for part in list(self._routes.values()))

    def as_json(self) -> list[dict[str, Any]]:
        """One object a route and model, sorted by their names."""
        return [{"route": route, "model": model, **part.as_json()} for (route, model), part in sorted(self._routes.items())]

    def write(self, path: Path) -> None:
        """Write `as_json` as a file, atomically."""
        write_json(path, self.as_json())

    def line(self) -> str:
        """One line for a person: where the run stands."""
        parts = list(self._routes.values())
        cached = sum(part.cached + part.shared for part in parts)
        return (
            f"{self.noun}: {self.answered:,} answered, {self.failed:,} failed; {sum(p.tolls.requests for p in parts):,} "
            f"requests, {sum(p.tolls.retries for p in parts):,} of them retries, {cached:,} replies from the cache, "
            f"{sum(p.prompt_tokens for p in parts):,} + {sum(p.completion_tokens for p in parts):,} tokens paid"
        )

    def check(self, fraction: float) -> None:
        """Raise an `InputError` that names the counts when more than `fraction` of the jobs have no answer."""
        # Divided, not multiplied: 29 of 100 are 0.29 exactly, and 0.29 * 100 is below 29.
        if self.failed and self.failed / (self.answered + self.failed) > fraction:
            raise self.error(f"more than max_failure_fraction {fraction:g} allows")

    def error(self, why: str) -> InputError:
        """An error that says how many jobs failed, for which reasons, with an example."""
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for part in self._routes.values():
            reasons += part.failures
            examples = part.examples | examples
        ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        counts = ", ".join(f"{reason} {count}" for reason, count in ranked)
        return InputError(
            f"{self.failed} of {self.answered + self.failed} {self.noun} failed ({counts}), {why}; such as "
            f"{examples[ranked[0][0]]}. Answers so far are kept and not paid for again: see to the cause or allow more failures, "
            "and run the same command again (with retry_failed, answers that were judged bad are asked for anew)."
        )
