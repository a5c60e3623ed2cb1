"""`moexpand data build`."""

from pathlib import Path

from moexpand.conf.schema import DataBuildCommand
from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.filters import Thresholds
from moexpand.data.pdf import PdfLimits


def run(config: DataBuildCommand) -> None:
    """Build shards as the configuration says, with a line of progress a file and a shard."""
    filters = config.filters
    options = BuildOptions(
        tokenizer=config.tokenizer,
        workers=config.workers,
        shard_samples=config.shard_samples,
        sample_characters=config.sample_characters,
        pdf_seconds=config.pdf_seconds,
        pdf=PdfLimits(config.image_dpi, filters.min_figure_points),
        thresholds=Thresholds(filters.min_characters, filters.max_symbol_ratio, filters.max_repetition),
    )

    def say(line: str) -> None:
        print(line, flush=True)

    build_dataset(config.pdfs, list(config.sources), Path(config.out), options, say)
