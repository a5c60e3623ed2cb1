"""`moexpand export`: write a run's checkpoint as a Hugging Face folder."""

from moexpand.conf.schema import ExportCommand
from moexpand.train.export import export


def run(config: ExportCommand) -> None:
    """Export and say what was written."""
    export(config, print)
