"""`moexpand doctor`: what this machine has, what is missing, what that costs, what mends it."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from moexpand.base.errors import CheckFailed
from moexpand.conf.schema import DoctorCommand
from moexpand.console import Console
from moexpand.launch.doctor import WRONG, examine

WIDTH = 100


def run(config: DoctorCommand) -> None:
    """Print the findings; fail where nothing would work."""
    findings = list(examine(Path(config.folder)))
    if config.format == "json":
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(plain=True)
        for finding in findings:
            console.line(f"{finding.state:<8} {finding.name:<19} {finding.found}")
            for label, text in (("costs", finding.cost), ("mend", finding.mend)):
                if text:
                    console.line(textwrap.fill(f"{label}: {text}", WIDTH, initial_indent=" " * 28, subsequent_indent=" " * 34))
    wrong = [finding.name for finding in findings if finding.state == WRONG]
    if wrong:
        raise CheckFailed(f"Training cannot work here because of {', '.join(wrong)}; the lines above say what mends it.")
