"""Jobs for the captioner whose answers can be foretold."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moexpand.data.captioner import CaptionAnswer, CaptionerSettings, CaptionJob, caption_all
from moexpand.data.endpoint import Route
from moexpand.data.ledger import Ledger
from tests.data.misbehaving_server import Answer, Call, MisbehavingServer

KEY = "sk-secret-0123456789"


GOOD = "A line plot of two series over time, in which the dashed one rises from about two to nearly seven."


def number_in(call: Call) -> int:
    """The job's number, which its caption holds."""
    found = re.search(r"Job number (\d+)\.", call.text)
    assert found, call.text
    return int(found.group(1))


def describe(call: Call) -> Answer:
    """What a model that behaves would say: it depends on the job alone."""
    return Answer(f"{GOOD} It is the image of job {number_in(call)}.")


def jobs_of(count: int, image: Path | None = None, kind: str = "figure") -> list[CaptionJob]:
    return [CaptionJob(f"job-{n}", kind, image, f"Job number {n}.", ("See Figure 1.",), "scientific") for n in range(count)]


def ask(
    server: MisbehavingServer, jobs: Iterable[CaptionJob], cache: Path, ledger: Ledger | None = None, **options: Any
) -> list[CaptionAnswer]:
    options = {"routes": (Route("scientific", server.url, "tester"),), "backoff_seconds": 0.01, "concurrency": 4, **options}
    return list(caption_all(jobs, CaptionerSettings(**options), cache, KEY, lambda line: None, ledger))


def first_time(misbehave: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
    """Misbehaves at the first request of each job and behaves afterwards."""
    seen: set[int] = set()

    def behave(call: Call) -> Answer:
        number = number_in(call)
        if number in seen:
            return describe(call)
        seen.add(number)
        return misbehave(call)

    return behave
