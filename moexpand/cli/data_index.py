"""`moexpand data index`."""

from pathlib import Path

from moexpand.conf.data_schema import DataIndexCommand
from moexpand.data.tar_index import index_tars


def run(config: DataIndexCommand) -> None:
    """Index a folder of tars, with a line of progress a tar."""

    def say(line: str) -> None:
        print(line, flush=True)

    folder = Path(config.shards)
    summary = index_tars(folder, config.tokenizer, config.text_key, config.workers, config.max_bad_fraction, say)
    dropped = summary["stages"]["samples"]["dropped"]
    reasons = f"; left out: {', '.join(f'{reason} {count}' for reason, count in dropped.items())}" if dropped else ""
    say(f"{folder}: {summary['samples']} samples, {summary['tokens']} tokens, {len(summary['shards'])} shards{reasons}")
