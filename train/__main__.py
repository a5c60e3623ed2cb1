"""A training worker: `torchrun ... -m moexpand.train key=value ...`; its result goes to exit.json in the run folder."""

import sys

from moexpand.train.signals import StopRequest

if __name__ == "__main__":
    request = StopRequest()  # before the long imports: a signal that comes during them is not lost

    from moexpand.train.work import train_worker

    sys.exit(train_worker(sys.argv[1:], request))
