"""`moexpand verify`: prove that every tensor of a child equals its recipe."""

import time
from pathlib import Path

from moexpand.conf.schema import VerifyCommand
from moexpand.console import Console
from moexpand.upcycle.meter import Meter
from moexpand.upcycle.verify import folder_bytes, verify


def run(config: VerifyCommand) -> None:
    """Compare, and say what was proven; a difference is raised as `CheckFailed`."""
    console = Console(config.plain)
    target = Path(config.target)
    begin = time.monotonic()
    proof = verify(Path(config.source), target, progress=Meter("verifying", folder_bytes(target), console.line))
    seconds = time.monotonic() - begin
    console.line(
        f"{target} is exactly what its plan makes of {config.source}: {proof.tensors:,} tensors, {proof.nbytes / 1e9:,.2f} GB "
        f"compared in {seconds:,.1f} s ({proof.nbytes / seconds / 1e6:,.0f} MB/s)."
    )
