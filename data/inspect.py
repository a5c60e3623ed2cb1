"""What a folder of shards holds: counts by kind, what was dropped and why, tokens, how well it packs, a few examples."""

from pathlib import Path
from typing import Any

import numpy as np

from moexpand.data.dataset import Corpus, read_summary
from moexpand.data.planning import PackSequence, SampleOrder
from moexpand.data.storage import open_storage

FILL_LENGTHS = (1024, 4096, 8192)
EXAMPLE_CHARACTERS = 160


def inspect_shards(folder: str | Path) -> dict[str, Any]:
    """Describe a folder of shards from its indexes; texts are read for the examples alone.

    Returns:
        tokenizer, samples, tokens, kinds (samples and tokens of each), stages (input, kept, dropped by reason), shards,
        token_lengths (median, 90 %, longest), series_points (shortest, median, longest) and series_rates (lowest, highest) where
        there are time series, fill (sequence length -> fraction of packs that is not padding), examples.

    Raises:
        InputError: the folder, a shard or an index is missing or damaged.
    """
    summary = read_summary(open_storage(str(folder)))
    corpus = Corpus(folder)
    kinds = {}
    examples = []
    for kind in np.unique(corpus.kind):
        chosen = np.flatnonzero(corpus.kind == kind)
        name = kind.decode()
        kinds[name] = {"samples": len(chosen), "tokens": int(corpus.tokens[chosen].sum())}
        sample = int(chosen[len(chosen) // 2])
        text = " ".join(corpus.text(sample).split())
        examples.append({"kind": name, "key": corpus.key[sample].decode(), "text": text[:EXAMPLE_CHARACTERS]})
    lengths = corpus.tokens + 1
    fill = {}
    for length in FILL_LENGTHS:
        packs = PackSequence(lengths, SampleOrder(len(lengths), seed=0), length, seed=0).packs_of_epoch(0)
        fill[str(length)] = round(float(lengths.sum() / (packs * length)), 4)
    return {
        "tokenizer": summary["tokenizer"],
        "samples": len(corpus),
        "tokens": int(corpus.tokens.sum()),
        "images": len(corpus.image_height),
        **_series(corpus),
        "kinds": kinds,
        "stages": summary["stages"],
        "shards": summary["shards"],
        "token_lengths": {
            "median": int(np.median(lengths)),
            "p90": int(np.quantile(lengths, 0.9)),
            "longest": int(lengths.max()),
        },
        "fill": fill,
        "examples": examples,
    }


def _series(corpus: Corpus) -> dict[str, Any]:
    points, rates = corpus.series_points, corpus.series_rate
    found: dict[str, Any] = {"series": len(points)}
    if len(points):
        found["series_points"] = {
            "shortest": int(points.min()),
            "median": int(np.median(points)),
            "longest": int(points.max()),
        }
        found["series_rates"] = {"lowest": float(rates.min()), "highest": float(rates.max())}
    return found
