"""Workers of a command that writes one result: started beside it with its configuration, cleared away when all went well."""

import shutil
from pathlib import Path
from typing import Any

from moexpand.base.files import disk_errors, write_atomic
from moexpand.conf.compose import to_yaml
from moexpand.launch.local import run_workers


def run_beside(module: str, config: Any, processes: int, folder: Path, launched: str) -> int:
    """Start `processes` workers of `module` and return their exit code.

    Args:
        folder: for their configuration, result and log; it stays when they fail.
        launched: name of the file that holds their configuration.
    """
    with disk_errors(f"preparing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / launched, to_yaml(config))
    arguments = ["--config-dir", str(folder), "--config-name", launched]
    code = run_workers(module, arguments, processes, log=folder / "launch.log", result=folder, grace_seconds=10.0)
    if code == 0:
        shutil.rmtree(folder)
    return code
