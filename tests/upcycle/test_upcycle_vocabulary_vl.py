"""`moexpand upcycle` of a Qwen3-VL-MoE with another tokenizer: pictures stand at the token that has moved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

from moexpand.base.errors import DONE
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.plan import read_plan
from moexpand.upcycle.recipe import Recipe
from tests.trained_tokenizers import SPECIALS, TEXTS, byte_level, permuted, saved
from tests.upcycle.conftest import Run
from tests.upcycle.vl_parent import parent_model

IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TEXT = f"{TEXTS[0]}<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>{TEXTS[1]}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer with places for pictures, and its tokens and one more under other ids."""
    base, old = tmp_path_factory.mktemp("tokenizers"), byte_level(400, specials=[*SPECIALS, *IDS.values()])
    return {"old": saved(old, base / "old"), "new": saved(permuted(old, ("<think>",)), base / "new")}


@pytest.fixture(scope="module")
def parent(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens visit all 4 experts, as a child's visit one copy of each, so both compute the same."""
    old = Tokenizer.from_file(str(tokenizers["old"] / "tokenizer.json"))
    folder = tmp_path_factory.mktemp("vl") / "parent"
    parent_model(num_experts=4, num_experts_per_tok=4, vocab_size=old.get_vocab_size() + 3).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: old.token_to_id(token) for key, token in IDS.items()}))
    shutil.copyfile(tokenizers["old"] / "tokenizer.json", folder / "tokenizer.json")
    return folder


def logits_by_token(model: Any, tokenizer: Tokenizer, names: list[str]) -> torch.Tensor:
    """Logits of TEXT with a picture of 4 x 4 patches, in the order of these tokens."""
    tokens = torch.tensor([tokenizer.encode(TEXT).ids])
    places = tokens == tokenizer.token_to_id("<|image_pad|>")
    assert int(places.sum()) == 4
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=places.int(),
            pixel_values=torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        ).logits[0]
    return logits[:, [tokenizer.token_to_id(name) for name in names]]  # type: ignore[no-any-return]


def test_a_child_with_moved_tokens_sees_its_pictures_as_its_parent_does(
    parent: Path, tokenizers: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    old, new = (Tokenizer.from_file(str(tokenizers[name] / "tokenizer.json")) for name in ("old", "new"))
    words = ("num_experts=16", "num_groups=4", "placement=block", f"tokenizer={tokenizers['new']}")
    code, _, said = run("upcycle", f"source={parent}", f"target={tmp_path / 'child'}", *words)
    assert code == DONE, said

    moved = {key: new.token_to_id(token) for key, token in IDS.items()}
    assert all(moved[key] != old.token_to_id(token) for key, token in IDS.items())
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert {key: config[key] for key in IDS} == moved
    planned = Recipe(open_checkpoint(parent), read_plan(tmp_path / "child" / "expansion.json")).architecture
    written = open_checkpoint(tmp_path / "child").architecture
    assert planned == written
    assert written.vision is not None
    assert written.vision.image_token_id == moved["image_token_id"]
    assert run("verify", f"source={parent}", f"target={tmp_path / 'child'}")[0] == DONE

    names = list(old.get_vocab())
    due = logits_by_token(Qwen3VLMoeForConditionalGeneration.from_pretrained(parent), old, names)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "child", trust_remote_code=True)
    torch.testing.assert_close(logits_by_token(model, new, names), due, rtol=1e-4, atol=1e-4)
