"""What the workers of a `train` command do, in this process or on ranks of `tests.processes`."""

import os
from pathlib import Path


def train_here(words: list[str]) -> None:
    """What a worker does, in this process."""
    from moexpand.conf.compose import compose_words
    from moexpand.parallel import ranks
    from moexpand.train.signals import StopRequest
    from moexpand.train.work import run

    config = compose_words("train", words[1:])
    Path(config.run.dir).mkdir(exist_ok=True)
    try:
        run(config, StopRequest())
    finally:
        ranks.stop()


def train_on_ranks(commands: list[list[str]]) -> None:
    """What every worker does for each of these commands."""
    for words in commands:
        train_here(words)
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a quicker rank would meet the others' old store
