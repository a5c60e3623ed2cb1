"""A training worker on a disk with FREE bytes left: `-m tests.train.small_disk_worker FREE key=value ...`."""

import sys
from collections import namedtuple

from moexpand.train.signals import StopRequest

if __name__ == "__main__":
    request = StopRequest()

    from moexpand.train import saving
    from moexpand.train.work import train_worker

    usage = namedtuple("usage", "total used free")(2**40, 0, int(sys.argv[1]))
    saving.shutil.disk_usage = lambda path: usage  # type: ignore[assignment, return-value]
    sys.exit(train_worker(sys.argv[2:], request))
