"""The model code of Intern-S1-Pro, in transformers, against float64 formulas and transformers' own Qwen3-VL-MoE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

from tests import closed_form
from tests.parents import make_child, make_parent
from tests.upcycle.test_conversion import LONGEST, converted, tensors, tower
from tests.upcycle.vl_parent import END, IMAGE, START, parent_model

TOKENS = np.random.default_rng(0).integers(0, 99, (2, 24))
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(folder: Path, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return loaded(folder)(**inputs).logits.double().numpy()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parent(tmp_path_factory.mktemp("pro") / "text", experts=8, top_k=2, vocab=100)


@pytest.fixture(scope="module")
def fourier(text: Path) -> Path:
    """With tables that mix, of each of the two key/value heads."""
    made = {"fope": True, "tower": tower(), "max_position_embeddings": LONGEST, "fope_init_factor": 2.0}
    return converted(text, text.with_name("fourier"), family="interns1_pro", compensate=False, **made)


def _mixed(folder: Path) -> closed_form.Turn:
    """The formula of Fourier positions with the folder's tables."""
    tables = {name: tensors(folder)[f"model.language_model.rotary_emb.{name}_coef"].double().numpy() for name in ("sin", "cos")}
    kept = tables["sin"].shape[-1]

    def turn(x_TD: np.ndarray, group: int) -> np.ndarray:
        half = x_TD.shape[1] // 2
        angles = np.arange(len(x_TD))[:, None] * 1e6 ** (-np.arange(kept) / half)
        ones = np.ones((len(x_TD), half - kept))
        cosines = np.concatenate([np.cos(angles) @ tables["cos"][group], ones], 1)
        sines = np.concatenate([np.sin(angles) @ tables["sin"][group], ones], 1)
        first, second = x_TD[:, :half], x_TD[:, half:]
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], 1)

    return turn


def test_fourier_positions_are_the_formula(text: Path, fourier: Path) -> None:
    due = closed_form.logits(text, TOKENS, closed_form.top_pick(2), turn=_mixed(fourier))
    plain = closed_form.logits(text, TOKENS, closed_form.top_pick(2))
    assert np.abs(due - plain).max() > 0.1
    assert np.abs(logits(fourier, input_ids=torch.from_numpy(TOKENS)) - due).max() < 1e-5


def test_a_child_routes_in_its_groups(text: Path, fourier: Path, tmp_path: Path) -> None:
    child = make_child(fourier, tmp_path / "child", num_experts=32, num_groups=2, placement="halves_tile")
    assert json.loads((child / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"].endswith(
        "modeling_interns1_pro_moexpand.InternS1ProForConditionalGeneration"
    )
    rows = json.loads((child / "expansion.json").read_text())["slot_to_parent"]
    picks = [closed_form.grouped_pick(row, 2, 2) for row in rows]
    due = closed_form.logits(text, TOKENS, picks, turn=_mixed(fourier))
    assert np.abs(logits(child, input_ids=torch.from_numpy(TOKENS)) - due).max() < 1e-5


def test_pictures_stand_at_consecutive_positions_and_there_is_no_deepstack(tmp_path: Path) -> None:
    """The reference is transformers' Qwen3-VL-MoE without DeepStack, told positions of one axis."""
    model = parent_model(dense=(), vision={"deepstack_visual_indexes": []})
    model.save_pretrained(tmp_path / "vl")
    pro = converted(tmp_path / "vl", tmp_path / "pro", family="interns1_pro")
    ids = torch.tensor([[5, START, *[IMAGE] * 6, END, 7, 8, START, *[IMAGE] * 4, END, 9]])
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    pixels = torch.randn(40, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    seen = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": (ids == IMAGE).int()}
    one_axis = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        reference = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "vl")
        due = reference(input_ids=ids, position_ids=one_axis, **seen).logits
        three_axes = reference(input_ids=ids, **seen).logits
    found = torch.from_numpy(logits(pro, input_ids=ids, **seen))
    assert float((due - three_axes).abs().max()) > 1e-2, "positions matter"
    assert float((found - due).abs().max()) < 1e-5


def test_generating_with_a_cache_continues_what_the_whole_forward_pass_says(fourier: Path) -> None:
    model, ids = loaded(fourier), torch.from_numpy(TOKENS[:1, :10])
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        whole = model(made).logits[0, 9:-1].argmax(-1)
    assert made[0, 10:].tolist() == whole.tolist()


def test_saving_gives_back_every_tensor_by_its_name(fourier: Path, tmp_path: Path) -> None:
    loaded(fourier).save_pretrained(tmp_path / "saved")
    before, after = tensors(fourier), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tables_stay_in_fp32_when_the_model_is_loaded_in_bf16(fourier: Path) -> None:
    model = loaded(fourier, dtype=torch.bfloat16)
    positions = model.model.language_model.rotary_emb
    assert (positions.sin_coef.dtype, model.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)


def test_the_config_is_refused_without_consent_and_knows_its_tower(fourier: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(fourier, trust_remote_code=False)
    config = AutoConfig.from_pretrained(fourier, trust_remote_code=True)
    assert (config.text_config.router_n_groups, list(config.vision_config.deepstack_visual_indexes)) == (1, [])
