"""A small corpus for the tests of the data room."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.tokens import Tokenizer, load_tokenizer
from moexpand.data.units import ReadOptions
from tests.data.series_maker import series_tokenizer

SENTENCE = "the expert router sends each token to eight of many experts and the loss falls while 随机森林 learns α β naïve"
WORDS = SENTENCE.split()


def write_jsonl(path: Path, documents: int, seed: int = 0) -> Path:
    """Documents of very different lengths, all distinct."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            length = rng.choice([45, 60, 90, 150, 400])
            words = [rng.choice(WORDS) for _ in range(length)]
            file.write(json.dumps({"text": f"Document {number} of {seed}. " + " ".join(words)}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 160 jsonl documents, 40 a shard, tokenised with qwen-8192."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "documents.jsonl", 160)
    options = BuildOptions(ReadOptions(tokenizer="qwen-8192"), workers=1, shard_samples=40)
    build_dataset(None, [str(source)], folder / "shards", options, lambda line: None)
    return folder / "shards"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("qwen-8192")


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That tokenizer as a Hugging Face folder."""
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(place)
    return place


@pytest.fixture(scope="session")
def auto(folder: Path) -> Any:
    """The folder opened by transformers."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen-8192 with the tokens of time series, as a Hugging Face folder."""
    return series_tokenizer(tmp_path_factory.mktemp("series-tokens") / "tokenizer")
