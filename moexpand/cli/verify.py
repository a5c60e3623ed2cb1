"""`moexpand verify`: prove that every tensor of a child equals its recipe."""

import time
from pathlib import Path

from moexpand.conf.schema import VerifyCommand
from moexpand.console import Console
from moexpand.upcycle.meter import metered
from moexpand.upcycle.verify import folder_bytes, verify


def run(config: VerifyCommand) -> None:
    """Compare, and say what was proven; a difference is raised as `CheckFailed`."""
    console = Console(config.plain)
    target = Path(config.target)
    begin = time.monotonic()
    with metered("verifying", folder_bytes(target), config.plain) as meter:
        proof = verify(Path(config.source), target, workers=config.workers, progress=meter)
    seconds = time.monotonic() - begin
    console.line(
        f"{target} is exactly what its plan makes of {config.source}: {proof.tensors:,} tensors, {proof.nbytes:,} bytes "
        f"compared in {seconds:,.1f} s ({proof.nbytes / seconds / 1e6:,.0f} MB/s)."
    )
    origin = "is what the placement's name calls for" if proof.map_computed else "is taken from the plan as it stands"
    console.line(f"The plan: {proof.plan.words()}. Its map {origin}.")
