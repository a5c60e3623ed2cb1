"""Shards, a run on two ranks that was never interrupted, and what was made of it: most tests compare with these."""

import random
from pathlib import Path

import pytest

from tests.commands import moexpand
from tests.parents import make_child

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 8,
}
"""A model of 128 experts, small enough that the embedding of 8,448 tokens is most of it."""
STEPS, STOP = 12, 5
SENTENCE = "the router sends every token to a few of many experts and the balance loss keeps their load even while 随机 α naïve"
WORDS = SENTENCE.split()


def settings(shards: Path, run: Path, **changes: object) -> list[str]:
    """Words of a `train` command on two ranks that takes seconds."""
    values: dict[str, object] = {
        "data.shards": shards,
        "run.dir": run,
        "train.steps": STEPS,
        "train.global_batch": 4,
        "train.seq_length": 64,
        "optim.lr": 1e-3,
        "launch.processes": 2,
        "parallel.expert": 2,
        "save.every": STOP,
        "save.keep": 9,
        "track.wandb": "off",
        "plain": "true",
        **{f"model.{name}": value for name, value in SHAPE.items()},
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return ["train", *(f"{name}={value}" for name, value in values.items() if value is not None)]


def from_checkpoint(checkpoint: Path) -> dict[str, object]:
    """Changes of `settings` to start from a folder."""
    return {"checkpoint": checkpoint, **{f"model.{name}": None for name in SHAPE}}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few plain-text files, built by the real command."""
    folder, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    (folder / "texts").mkdir()
    for number in range(40):
        paragraphs = [" ".join(rng.choices(WORDS, k=rng.choice([45, 90, 200]))) for _ in range(3)]
        (folder / "texts" / f"{number}.txt").write_text(f"Text {number}.\n\n" + "\n\n".join(paragraphs), encoding="utf-8")
    done = moexpand(
        "data", "build", f"sources=[{folder / 'texts'}]", f"out={folder / 'shards'}", "tokenizer=qwen-8192", "workers=1"
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="session")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of twelve steps on two ranks, saved after 5, 10 and 12, evaluated at its ends."""
    run = tmp_path_factory.mktemp("train") / "straight"
    done = moexpand(*settings(shards, run, evaluate__every=STEPS))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def exported(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The straight run as a Hugging Face folder."""
    target = tmp_path_factory.mktemp("train") / "exported"
    done = moexpand("export", f"run={straight}", f"target={target}")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def child(exported: Path) -> Path:
    """The exported parent's child of 512 experts in 8 groups."""
    return make_child(exported, exported.with_name("child"))
