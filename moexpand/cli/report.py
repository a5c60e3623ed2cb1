"""`moexpand report`: a run, or several, as one HTML page with plots."""

from moexpand.conf.schema import ReportCommand
from moexpand.train.report import report


def run(config: ReportCommand) -> None:
    """Write the page and say where it is."""
    report(config, print)
