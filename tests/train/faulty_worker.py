"""A training worker in which rank 1 fails while it dispatches tokens: `-m tests.train.faulty_worker HOW FOLDER key=value ...`.

HOW is `dies`, killed as by the system when memory runs out, or `hangs`, stopped for good.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from moexpand.train.signals import StopRequest
from moexpand.train.work import train_worker

CALL = 4
"""The dispatch that fails: in the second step of a run of two layers and a micro-batch a rank."""


def fail_in_dispatch(number: signal.Signals, folder: Path) -> None:
    """Make the CALL-th dispatch of this process the last thing that it does, whichever dispatcher runs."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher

    from moexpand.parallel.dispatcher import GroupedAllGather

    calls = 0

    def failing(dispatch: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == CALL:
                (folder / "failed").touch()
                os.kill(os.getpid(), number)
            return dispatch(*arguments, **options)

        return wrapped

    for dispatcher, method in (
        (GroupedAllGather, "gather"),
        (MoEAlltoAllTokenDispatcher, "token_dispatch"),
        (MoEAllGatherTokenDispatcher, "token_dispatch"),
    ):
        setattr(dispatcher, method, failing(getattr(dispatcher, method)))


if __name__ == "__main__":
    how, folder = sys.argv[1], Path(sys.argv[2])
    (folder / f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        fail_in_dispatch({"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[how], folder)
    sys.exit(train_worker(sys.argv[3:], StopRequest()))
