"""`moexpand verify`: prove that every tensor of a child equals its recipe."""

import time
from pathlib import Path

from moexpand.conf.schema import VerifyCommand
from moexpand.console import Console
from moexpand.upcycle.calibration import read_calibration
from moexpand.upcycle.meter import metered
from moexpand.upcycle.verify import Proof, folder_bytes, verify


def run(config: VerifyCommand) -> None:
    """Compare, and say what was proven; a difference is raised as `CheckFailed`."""
    console = Console(config.plain)
    target = Path(config.target)
    calibration = None if config.calibration is None else read_calibration(Path(config.calibration))
    usage = None if config.usage is None else Path(config.usage)
    begin = time.monotonic()
    with metered("verifying", folder_bytes(target), config.plain) as meter:
        proof = verify(Path(config.source), target, config.workers, meter, calibration, usage)
    seconds = time.monotonic() - begin
    console.line(
        f"{target} is exactly what its plan makes of {config.source}: {proof.tensors:,} tensors, {proof.nbytes:,} bytes "
        f"compared in {seconds:,.1f} s ({proof.nbytes / seconds / 1e6:,.0f} MB/s)."
    )
    console.line(f"The plan: {proof.plan.words()}. Its map {_origin(proof)}.")


def _origin(proof: Proof) -> str:
    """How the map was checked, and what it takes to check more."""
    if proof.map_computed:
        return "is what its placement calls for"
    made_from = {"calibration=FOLDER": proof.plan.calibration, "usage=FILE": proof.plan.usage}
    lacking = " and ".join(key for key, digest in made_from.items() if digest is not None)
    return "is taken from the plan as it stands" + (f"; {lacking} would have it computed again" if lacking else "")
