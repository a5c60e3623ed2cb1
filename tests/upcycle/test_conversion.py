"""Conversions against the source's own bytes, transformers, and the formulas of rotary and Fourier positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moexpand.base.errors import InputError
from moexpand.upcycle.checkpoint import open_checkpoint
from moexpand.upcycle.conversion import Changes, Conversion
from moexpand.upcycle.folder import write_checkpoint
from tests import closed_form
from tests.parents import make_child, make_parent
from tests.upcycle import families
from tests.upcycle.vl_parent import parent_model

TOKENS = np.random.default_rng(0).integers(0, 99, (2, 24))


def converted(source: Path, target: Path, **changes: Any) -> Path:
    conversion = Conversion(open_checkpoint(source), Changes(**changes))
    write_checkpoint(target, conversion.config, conversion.tensors, conversion.produce, source, "1MB")
    return target


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "vl"
    parent_model(dense=()).save_pretrained(folder)
    return folder


def test_text_of_a_vl_model_computes_what_the_vl_model_does_on_text(vl: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3VLMoeForConditionalGeneration

    text = converted(vl, tmp_path / "text", family="qwen3_moe")
    assert config_of(text)["model_type"] == "qwen3_moe"
    assert config_of(text)["norm_topk_prob"] is True
    with torch.no_grad():
        due = Qwen3VLMoeForConditionalGeneration.from_pretrained(vl)(torch.from_numpy(TOKENS)).logits
        found = AutoModelForCausalLM.from_pretrained(text)(torch.from_numpy(TOKENS)).logits
    assert float((found - due).abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "interns1"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_text_of_every_family_is_its_decoder_bit_for_bit(family: str, fused: bool, tmp_path: Path) -> None:
    """In bf16, with a layer without experts."""
    source = families.make(family, tmp_path / "source", fused=fused)
    text = converted(source.folder, tmp_path / "text", family="qwen3_moe")
    due = {
        name.replace("model.language_model.", "model."): value
        for name, value in source.tensors.items()
        if name.startswith(("model.language_model.", "lm_head.")) and "rotary_emb" not in name
    }
    found = tensors(text)
    assert found.keys() == due.keys()
    assert all(torch.equal(found[name], value) for name, value in due.items())
    assert open_checkpoint(text).architecture.model_type == "qwen3_moe"


def test_text_by_way_of_intern_s1_pro_is_the_same_text(vl: Path, tmp_path: Path) -> None:
    straight = tensors(converted(vl, tmp_path / "text", family="qwen3_moe"))
    pro = converted(vl, tmp_path / "pro", family="interns1_pro")
    around = tensors(converted(pro, tmp_path / "around", family="qwen3_moe"))
    assert straight.keys() == around.keys()
    assert all(torch.equal(value, around[name]) for name, value in straight.items())


def test_a_time_series_encoder_stays_where_the_kind_stays(tmp_path: Path) -> None:
    source = families.make("interns1_pro", tmp_path / "source")
    after = tensors(converted(source.folder, tmp_path / "fresh", tower=tower(32)))
    for name, value in source.tensors.items():
        assert name.startswith("model.visual.") or torch.equal(after[name], value), name


def test_intern_s1_pro_of_a_vl_model_has_its_bytes_expert_by_expert_and_no_deepstack(vl: Path, tmp_path: Path) -> None:
    target = converted(vl, tmp_path / "pro", family="interns1_pro")
    before, after = tensors(vl), tensors(target)
    stack = before["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(8):
        gate = after[f"model.language_model.layers.1.mlp.experts.{expert}.gate_proj.weight"]
        up = after[f"model.language_model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert torch.equal(torch.cat([gate, up]), stack[expert]), "transformers 5 saves [E, out, in]"
    assert not [name for name in after if "deepstack" in name or ".experts.gate_up_proj" in name]
    same = [name for name in before if ".mlp.experts." not in name and "deepstack" not in name]
    assert all(torch.equal(after[name], before[name]) for name in same)
    assert "deepstack_visual_indexes" not in config_of(target)["vision_config"]
    assert config_of(target)["image_token_id"] == config_of(vl)["image_token_id"]
    assert open_checkpoint(target).architecture.mrope_section == ()


LONGEST, THETA = 60, 1e6
"""Of 8 frequencies of heads of 16, those of theta^(-2i/16) above 2 pi / 60 are kept: two."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text parent, and the same decoder with a fresh tower under Intern-S1-Pro's names."""
    folder = tmp_path_factory.mktemp("fope")
    parent = make_parent(folder / "parent", experts=8, top_k=2, vocab=100)
    return parent, folder


def tower(hidden: int = 64) -> Any:
    from moexpand.upcycle.architecture import VisionArchitecture

    return VisionArchitecture(
        depth=1, hidden_size=16, intermediate_size=32, num_heads=2, in_channels=3, patch_size=4, temporal_patch_size=2,
        spatial_merge_size=2, out_hidden_size=hidden, num_position_embeddings=16, image_token_id=99,
    )  # fmt: skip


def _fope(kept: int) -> closed_form.Turn:
    """Identity tables: the kept pairs turn as in RoPE, the others have cosine and sine one."""

    def turn(x_TD: np.ndarray, group: int) -> np.ndarray:
        half = x_TD.shape[1] // 2
        angles = np.arange(len(x_TD))[:, None] * THETA ** (-np.arange(kept) / half)
        ones = np.ones((len(x_TD), half - kept))
        cosines, sines = np.concatenate([np.cos(angles), ones], 1), np.concatenate([np.sin(angles), ones], 1)
        first, second = x_TD[:, :half], x_TD[:, half:]
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], 1)

    return turn


def _unturned(kept: int) -> closed_form.Turn:
    """What compensated FoPE means: the kept pairs turn, the others stay as they are."""

    def turn(x_TD: np.ndarray, group: int) -> np.ndarray:
        half = x_TD.shape[1] // 2
        angles = np.zeros((len(x_TD), half))
        angles[:, :kept] = np.arange(len(x_TD))[:, None] * THETA ** (-np.arange(kept) / half)
        first, second = x_TD[:, :half], x_TD[:, half:]
        return np.concatenate(
            [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], 1
        )

    return turn


@pytest.mark.parametrize("compensate", [True, False])
def test_what_fope_leaves_out_counts_twice_unless_it_is_compensated(pair: tuple[Path, Path], compensate: bool) -> None:
    """Logits in float64 by the formula of FoPE and the converted weights, against the parent's with those pairs unturned."""
    parent, folder = pair
    made = {"family": "interns1_pro", "fope": True, "tower": tower(), "max_position_embeddings": LONGEST}
    target = converted(parent, folder / f"fope{compensate}", compensate=compensate, **made)
    arch = open_checkpoint(target).architecture
    assert arch.fope_frequencies == sum(THETA ** (-2 * pair / 16) > 2 * np.pi / LONGEST for pair in range(8))
    kept, weights = arch.fope_frequencies, closed_form.weights_of(target)
    renamed = {name.replace("model.language_model.", "model."): value for name, value in weights.items()}
    pick = closed_form.top_pick(2)
    found = closed_form.logits(parent, TOKENS, pick, renamed, _fope(kept))
    meant = closed_form.logits(parent, TOKENS, pick, turn=_unturned(kept))
    distance = np.abs(found - meant).max()
    assert distance < 1e-6 if compensate else distance > 0.1
    for name in ("sin_coef", "cos_coef"):
        table = tensors(target)[f"model.language_model.rotary_emb.{name}"]
        assert table.dtype == torch.float32
        assert torch.equal(table, torch.eye(kept).expand(2, kept, kept))


def test_only_the_scaled_norms_differ(pair: tuple[Path, Path]) -> None:
    parent, folder = pair
    made = {"family": "interns1_pro", "fope": True, "tower": tower(), "max_position_embeddings": LONGEST}
    before, after = tensors(parent), tensors(converted(parent, folder / "scaled", **made))
    scaled = [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    for name, value in before.items():
        found = after[name.replace("model.", "model.language_model.", 1)]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            factor = torch.ones(16)
            factor[scaled] = 0.5**0.5
            assert torch.allclose(found, value * factor, rtol=1e-6)
            assert torch.equal(found[[0, 1, 8, 9]], value[[0, 1, 8, 9]])
        else:
            assert torch.equal(found, value), name


def test_noise_of_tables_has_the_published_width_and_follows_the_seed(pair: tuple[Path, Path]) -> None:
    parent, folder = pair
    made = {"family": "interns1_pro", "fope": True, "tower": tower(), "fope_init_factor": 0.5, "max_position_embeddings": 400_000}
    found = [tensors(converted(parent, folder / f"noise{seed}", seed=seed, **made)) for seed in (0, 1)]
    name = "model.language_model.rotary_emb.sin_coef"
    size = found[0][name].shape[-1]
    noise = torch.cat([(each[name] - torch.eye(size)).flatten() for each in found])
    due = torch.nn.init.xavier_normal_(torch.empty(2, size, size, dtype=torch.float64).expand(1, 2, size, size)[0].clone(), 0.5)
    assert size == 7
    expected = 0.5 * (2 / (size * size + 2 * size)) ** 0.5
    assert float(noise.std()) == pytest.approx(expected, rel=0.2)
    assert float(due.std()) == pytest.approx(expected, rel=0.2), "torch's own Xavier of that shape"
    assert not torch.equal(found[0][name], found[1][name])


def test_a_child_keeps_its_groups(vl: Path, tmp_path: Path) -> None:
    child = make_child(vl, tmp_path / "child", num_experts=16, num_groups=4, placement="halves_tile")
    pro = open_checkpoint(converted(child, tmp_path / "pro", family="interns1_pro")).architecture
    assert (pro.model_type, pro.num_experts, pro.router_n_groups) == ("interns1_pro", 16, 4)
    text = converted(child, tmp_path / "text", family="qwen3_moe")
    assert config_of(text)["model_type"] == "qwen3_moe_grouped"
    assert (text / "modeling_qwen3_moe_grouped.py").is_file()


def test_a_fresh_tower_of_another_size_takes_the_place_of_the_old_one(vl: Path, tmp_path: Path) -> None:
    fresh = converted(vl, tmp_path / "fresh", tower=tower(48))
    before, after = tensors(vl), tensors(fresh)
    assert config_of(fresh)["vision_config"]["depth"] == 1
    assert config_of(fresh)["image_token_id"] == 99
    assert config_of(fresh)["vision_config"]["model_type"] == config_of(vl)["vision_config"]["model_type"]
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("model.visual."))
    assert not [name for name in after if "blocks.1." in name or "deepstack" in name]
    again = tensors(converted(vl, tmp_path / "again", tower=tower(48)))
    assert all(torch.equal(value, again[name]) for name, value in after.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "is of model_type=qwen3_vl_moe already, so nothing would change"),
        ({"fope": True}, "positions=fope is for family=interns1_pro, and the target is qwen3_vl_moe"),
        ({"family": "interns1_pro", "rope_theta": 2.0}, "rope_theta=2.0 is for positions=fope"),
        ({"family": "qwen3_moe", "tower": tower(48)}, "tower=fresh is for a model with a tower"),
        ({"tower": tower(64)}, "The fresh tower gives features of 64"),
    ],
)
def test_what_makes_no_sense_is_refused(vl: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Conversion(open_checkpoint(vl), Changes(**changes))


def test_a_text_model_needs_a_tower_to_become_intern_s1_pro(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="give tower=fresh"):
        Conversion(open_checkpoint(pair[0]), Changes(family="interns1_pro"))


def test_fourier_positions_cannot_be_added_twice_or_taken_out(tmp_path: Path) -> None:
    source = open_checkpoint(families.make("interns1_pro", tmp_path / "source").folder)
    with pytest.raises(InputError, match="has Fourier positions already"):
        Conversion(source, Changes(family="interns1_pro", fope=True))
    with pytest.raises(InputError, match="they cannot be taken out"):
        Conversion(source, Changes(family="qwen3_moe"))
