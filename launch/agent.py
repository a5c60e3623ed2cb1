"""torchrun that leaves signals to our launcher: `python -m moexpand.launch.agent` takes torchrun's arguments.

Batch systems send a signal to every process of a job. The workers save and end by themselves; torchrun, which would kill them
after 30 seconds, or die of SIGUSR1 at once, must only go on waiting. What the launcher and the kernel send to end it is SIGHUP.
Signals that are caught here are back at their defaults in the workers, which ignored ones would not be.
"""

import signal
from types import FrameType

LEFT_TO_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ENDS = signal.SIGHUP


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing: the workers get the same signal."""


if __name__ == "__main__":
    for each in LEFT_TO_WORKERS:
        signal.signal(each, _leave)

    from torch.distributed.run import main

    main()
