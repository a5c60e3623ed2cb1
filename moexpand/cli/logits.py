"""`moexpand logits`: run the engine forward on a Hugging Face folder, in this process or in several."""

import shutil

from moexpand.base.files import disk_errors, write_atomic
from moexpand.conf.compose import to_yaml
from moexpand.conf.schema import LogitsCommand
from moexpand.launch.local import run_workers
from moexpand.train import logits

LAUNCHED = "launch.yaml"


def run(config: LogitsCommand) -> int:
    """Check, then compute and write the logits."""
    logits.check(config, config.processes)
    if config.processes == 1:
        logits.run_worker(config)
        return 0
    folder = logits.result_folder(config)
    with disk_errors(f"preparing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / LAUNCHED, to_yaml(config))
    arguments = ["--config-dir", str(folder), "--config-name", LAUNCHED]
    code = run_workers(
        "moexpand.train.logits", arguments, config.processes, log=folder / "launch.log", result=folder, grace_seconds=10.0
    )
    if code == 0:
        shutil.rmtree(folder)
    return code
