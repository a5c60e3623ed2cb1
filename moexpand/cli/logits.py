"""`moexpand logits`: run the engine forward on a Hugging Face folder, in this process or in several."""

from moexpand.cli.workers import run_beside
from moexpand.conf.schema import LogitsCommand
from moexpand.train import logits

LAUNCHED = "launch.yaml"


def run(config: LogitsCommand) -> int:
    """Check, then compute and write the logits."""
    logits.check(config, config.processes)
    if config.processes == 1:
        logits.run_worker(config)
        return 0
    return run_beside("moexpand.train.logits", config, config.processes, logits.result_folder(config), LAUNCHED)
