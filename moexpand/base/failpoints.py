"""Named places at which a test makes a process fail: `MOEXPAND_FAILPOINTS=save.rename=kill` and the like.

A fault can be injected into the real command without changing it. The variable is read once; without it a failpoint is a look
into an empty table. Its form is `NAME[@HIT][#RANK]=ACTION`, several separated by commas: the HIT-th time (1 when not given) that
a process comes to NAME, on rank RANK alone (on every rank when not given).

Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `term` (SIGTERM), `full` (the disk is full), `broken` (the disk fails),
`fail` (an error that nobody foresaw).
"""

import errno
import os
import re
import signal
from dataclasses import dataclass

VARIABLE = "MOEXPAND_FAILPOINTS"

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}


@dataclass
class _Armed:
    action: str
    hit: int


def _armed(text: str, rank: str) -> dict[str, list[_Armed]]:
    """The failpoints of this rank by name."""
    found: dict[str, list[_Armed]] = {}
    for word in filter(None, text.split(",")):
        match = re.fullmatch(r"([\w.]+)(?:@(\d+))?(?:#(\d+))?=(\w+)", word)
        assert match, f"{VARIABLE}: {word} is not NAME[@HIT][#RANK]=ACTION"
        assert match[4] in (*SIGNALS, *ERRORS, "fail"), f"{VARIABLE}: {word} has no such action"
        if match[3] in (None, rank):
            found.setdefault(match[1], []).append(_Armed(match[4], int(match[2] or 1)))
    return found


_ARMED = _armed(os.environ.get(VARIABLE, ""), os.environ.get("RANK", "0"))


def failpoint(name: str) -> None:
    """Fail here if a test asked for it."""
    armed = _ARMED.get(name, ())
    for each in armed:
        each.hit -= 1
    for each in armed:
        if each.hit == 0:
            _fail(each.action, name)


def _fail(action: str, name: str) -> None:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]), f"failpoint {name}")
    else:
        raise RuntimeError(f"failpoint {name}")
