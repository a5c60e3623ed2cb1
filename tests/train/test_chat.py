"""The recipe for conversations: a child learns the answers, with thinking and without, and transformers generates them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.data.loader import PackedData
from tests.commands import moexpand
from tests.parents import make_child, make_parent
from tests.train.conftest import from_checkpoint, settings

QUESTIONS = ["What does the router do?", "Who counts the load?", "Which layer comes first?", "What is a group?"]
THOUGHTS = ["It reads a token.", "Some loss must.", "The lowest one.", "Experts side by side."]
ANSWERS = ["It picks experts.", "The balance loss.", "The embedding.", "A row of experts."]
SPEAK, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every question twice: with thinking, and with thinking off."""
    folder = tmp_path_factory.mktemp("chat")
    rows = []
    for question, thought, answer in zip(QUESTIONS, THOUGHTS, ANSWERS, strict=True):
        asked = {"role": "user", "content": question}
        rows.append({"messages": [asked, {"role": "assistant", "content": answer, "reasoning_content": thought}]})
        rows.append({"messages": [asked, {"role": "assistant", "content": answer}], "enable_thinking": False})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = moexpand(
        "data", "build", f"sources=[{folder / 'chats.jsonl'}]", f"out={folder / 'shards'}", "tokenizer=qwen-8192", "workers=1",
        "filters.min_characters=1", "filters.text_similarity=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def prompt(question: str, thinking: bool) -> str:
    """What a model is given, in Qwen3's layout."""
    shut = "" if thinking else "<think>\n\n</think>\n\n"
    return f"{SPEAK}user\n{question}{END}\n{SPEAK}assistant\n{shut}"


def due_answers() -> list[str]:
    thinking = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)]
    return [text for pair in zip(thinking, ANSWERS, strict=True) for text in pair]


def test_only_answers_are_trained_on_in_packs_of_several_conversations(chats: Path) -> None:
    data = PackedData(chats, 96, 1, 0, held_out=0.0)
    batches = [data.batch(step)[0] for step in range(data.packs_per_epoch)]
    assert max(len(batch.cu_seqlens) for batch in batches) > 3, "a pack holds several conversations"
    found, prompts = [], []
    for batch in batches:
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mask = batch.loss_mask[start:stop] > 0
            if mask.any():
                found.append(data.tokenizer.decode(batch.labels[start:stop][mask].tolist()))
                before = batch.tokens[start : start + int(mask.argmax()) + 1]
                prompts.append(data.tokenizer.decode(before.tolist()))
    ended = [text.removesuffix("<|endoftext|>") for text in found]
    assert sorted(ended) == sorted(f"{answer}{END}" for answer in due_answers())
    assert sorted(prompts) == sorted(prompt(question, thinking) for question in QUESTIONS for thinking in (True, False))


@pytest.fixture(scope="module")
def tuned(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child of 32 experts in 4 groups after the recipe, at a rate that such a small model needs."""
    folder = tmp_path_factory.mktemp("tuned")
    parent = make_parent(folder / "parent", experts=8, top_k=4, vocab=8448, hidden=64)
    child = make_child(parent, folder / "child", num_experts=32, num_groups=4, placement="halves_tile")
    tokenizer = PackedData(chats, 96, 1, 0, held_out=0.0).tokenizer
    tokenizer.save(child)
    words: dict[str, Any] = {
        "experiment": "fine_tune", "train.steps": 120, "train.seq_length": 96, "optim.lr": 3e-3, "optim.warmup_steps": 5,
        "data.held_out": 0.0, "evaluate.every": 0, "save.every": 0,
    }  # fmt: skip
    done = moexpand(*settings(chats, folder / "run", **from_checkpoint(child), **words))
    assert done.returncode == 0, done.stderr
    assert moexpand("export", f"run={folder / 'run'}", f"target={folder / 'tuned'}").returncode == 0
    return folder / "tuned"


@pytest.mark.layouts
def test_the_child_answers_with_thinking_and_without(tuned: Path, chats: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    end = tokenizer.convert_tokens_to_ids(END)
    said = []
    for question in QUESTIONS:
        for thinking in (True, False):
            ids = tokenizer(prompt(question, thinking), return_tensors="pt", add_special_tokens=False).input_ids
            with torch.no_grad():
                made = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=end)
            said.append(tokenizer.decode(made[0, ids.shape[1] :].tolist()).removesuffix(END))
    assert said == due_answers()


def test_the_loss_of_a_step_is_that_of_the_answers_alone(tuned: Path, chats: Path, tmp_path: Path) -> None:
    """transformers' mean over the trained tokens of the first global batch, each conversation alone."""
    from transformers import AutoModelForCausalLM

    words = {"train.steps": 1, "train.seq_length": 96, "optim.lr": 0.0, "data.held_out": 0.0, "save.every": 0}
    done = moexpand(*settings(chats, tmp_path / "run", **from_checkpoint(tuned), **words))
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    model = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True).eval()
    losses = []
    for batch in PackedData(chats, 96, 4, 0, held_out=0.0).batch(0):
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mask = batch.loss_mask[start:stop] > 0
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.tokens[None, start:stop])).logits[0]
            each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels[start:stop]), reduction="none")
            losses += each.numpy()[mask].tolist()
    assert row["tokens"] == len(losses)
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
