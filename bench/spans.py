"""Characters per token of sequences in their own pieces against plain Qwen, and what looking for tags costs.

`python bench/spans.py [FOLDER]`: fetches the packages into a temporary folder, or reads DOMAIN.held_out.txt from a folder that
`python -m moexpand.data.span_training` wrote. Sequences are those held out of training, tags are not counted.
"""

import importlib.metadata
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moexpand.base.errors import InputError
from moexpand.data.span_training import fetch, split
from moexpand.data.spans import SpanTokenizer
from moexpand.data.tokens import load_tokenizer

ROUNDS = 7
SENTENCE = "the expert router sends each token to eight of many experts and the loss falls while 随机森林 learns α β naïve"


def held_out(folder: Path | None) -> dict[str, list[str]]:
    """Sequences of each domain that the pieces were not trained on."""
    if folder is not None:
        files = sorted(folder.glob("*.held_out.txt"))
        return {file.name.partition(".")[0]: file.read_text().split() for file in files}
    with tempfile.TemporaryDirectory() as scratch:
        return {domain: split(lines)[1] for domain, lines in fetch(Path(scratch), print).items()}


def seconds(encode: Callable[[str], list[int]], text: str) -> float:
    """Median time of one call."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        encode(text)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("sentencepiece", "tiktoken")))
    science, qwen = load_tokenizer("qwen-science"), load_tokenizer("qwen")
    assert isinstance(science, SpanTokenizer)
    try:
        found = held_out(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except InputError as error:
        print(f"Nothing was measured: {error}")
        return
    for domain in science.domains:
        lines = found[domain.name]
        characters = sum(map(len, lines))
        own = sum(len(domain.encode(line) or qwen.encode(line)) for line in lines)
        plain = sum(len(qwen.encode(line)) for line in lines)
        print(
            f"{domain.name}: {len(lines):,} sequences, {characters:,} characters; characters per token {characters / own:.2f}, "
            f"plain Qwen {characters / plain:.2f}: {own / plain:.0%} of the tokens"
        )
    words = random.Random(0)
    text = " ".join(words.choices(SENTENCE.split(), k=200_000))
    tagged = "".join(f"It is <protein>{line}</protein>. " for line in found["PROT"])
    for name, what in (("text without tags", text), ("tagged proteins", tagged)):
        rates = [len(what) / seconds(tokenizer.encode, what) / 1e6 for tokenizer in (science, qwen)]
        print(f"{name}: {rates[0]:.2f} million characters a second, plain Qwen {rates[1]:.2f}")


if __name__ == "__main__":
    main()
