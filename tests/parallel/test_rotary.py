"""Tables of RoPE, interleaved MRoPE and FoPE against transformers and against formulas in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.parallel.rotary import Rotary, RotaryTables, axis_of
from moexpand.parallel.shape import ModelShape

INTERN_S1_PRO = {"rope_theta": 5e6, "max_position_embeddings": 262_144, "head_dim": 128, "num_key_value_heads": 4}
KEPT = 45
"""Frequencies above one turn in 262,144 positions."""


def shape_with(**changes: Any) -> ModelShape:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    return ModelShape(**(sizes | changes))


@pytest.fixture
def one_rank() -> Any:
    from moexpand.parallel import ranks
    from moexpand.parallel.shape import Layout

    yield ranks.start(Layout())
    ranks.stop()


def _formula(coefficients: dict[str, np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
    """FoPE of Intern-S1-Pro in float64: [T, heads, 128] by name."""
    theta, width = INTERN_S1_PRO["rope_theta"], INTERN_S1_PRO["head_dim"]
    frequencies = theta ** (-2 * np.arange(width // 2) / width)
    frequencies = frequencies[frequencies > 2 * math.pi / INTERN_S1_PRO["max_position_embeddings"]]
    assert len(frequencies) == KEPT
    found = {}
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        waves = function(positions[:, None].astype(np.float64) * frequencies)
        tables = np.ones((len(positions), len(coefficients[name]), width // 2))
        for head, mix in enumerate(coefficients[name].astype(np.float64)):
            for lane in range(KEPT):
                tables[:, head, lane] = sum(waves[:, source] * mix[source, lane] for source in range(KEPT))
        found[name] = np.concatenate([tables, tables], axis=-1)
    return found


def _fope(dtype: torch.dtype, coefficients: dict[str, np.ndarray]) -> Rotary:
    rotary = Rotary(shape_with(**INTERN_S1_PRO, fope_frequencies=KEPT, fope_by_head=True), dtype)
    for name, mix in coefficients.items():
        getattr(rotary, f"{name}_coef").copy_(torch.from_numpy(mix))
    return rotary


def _mixes() -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(1)
    return {name: np.eye(KEPT) + drawn.normal(0, 0.015, (4, KEPT, KEPT)) for name in ("cos", "sin")}


def test_fope_with_the_released_constants_is_the_formula_in_float64(one_rank: Any) -> None:
    positions = np.array([0, 1, 2, 77, 4095, 262_143])
    due = _formula(_mixes(), positions)
    found = _fope(torch.float64, _mixes())(torch.from_numpy(positions))
    for table, name in ((found.cosines, "cos"), (found.sines, "sin")):
        assert table.shape == (6, 4, 128)
        assert np.abs(table.numpy() - due[name]).max() < 1e-9
    short = _fope(torch.float32, _mixes())(torch.from_numpy(positions[:4]))
    assert np.abs(short.cosines.numpy() - due["cos"][:4]).max() < 5e-5, "fp32 angles of position 77 are exact to 4e-6"


def test_queries_are_turned_by_the_tables_of_their_key_heads(one_rank: Any) -> None:
    positions = np.arange(5)
    tables = _formula(_mixes(), positions)
    drawn = np.random.default_rng(2).normal(size=(5, 16, 128))
    due = np.empty_like(drawn)
    for head in range(16):
        x, own = drawn[:, head], head // 4
        crossed = np.concatenate([-x[:, 64:], x[:, :64]], axis=1)
        due[:, head] = x * tables["cos"][:, own] + crossed * tables["sin"][:, own]
    found = _fope(torch.float64, _mixes())(torch.from_numpy(positions)).turn(torch.from_numpy(drawn))
    assert np.abs(found.numpy() - due).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("by_head", [True, False])
def test_fope_with_identity_and_nothing_clipped_is_rope_to_the_last_bit(one_rank: Any, dtype: torch.dtype, by_head: bool) -> None:
    positions = torch.tensor([0, 1, 5, 1000, 262_143])
    fope = Rotary(shape_with(rope_theta=5e6, fope_frequencies=64, fope_by_head=by_head), dtype)
    fope.sin_coef.copy_(torch.eye(64).expand_as(fope.sin_coef))
    fope.cos_coef.copy_(torch.eye(64).expand_as(fope.cos_coef))
    rope = Rotary(shape_with(rope_theta=5e6), dtype)(positions)
    found = fope(positions)
    assert torch.equal(found.cosines, rope.cosines.expand_as(found.cosines))
    assert torch.equal(found.sines, rope.sines.expand_as(found.sines))


def _transformers_tables(section: list[int], width: int, axes_3T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section, "mrope_interleaved": True}
    embedding = Qwen3VLMoeTextRotaryEmbedding(Qwen3VLMoeTextConfig(head_dim=width, rope_parameters=rope))
    cosines, sines = embedding(torch.zeros(1), axes_3T[:, None])
    return cosines[0], sines[0]


@pytest.mark.parametrize(("section", "width"), [([24, 20, 20], 128), ([2, 1, 1], 8), ([4, 6, 6], 32)])
def test_interleaved_mrope_is_transformers_bit_for_bit(section: list[int], width: int) -> None:
    axes_3T = torch.from_numpy(np.random.default_rng(3).integers(0, 5000, (3, 40)))
    cosines, sines = _transformers_tables(section, width, axes_3T)
    found = Rotary(shape_with(rope_theta=5e6, head_dim=width, mrope_section=tuple(section)), torch.float32)(axes_3T)
    assert torch.equal(found.cosines[:, 0], cosines)
    assert torch.equal(found.sines[:, 0], sines)


def test_the_released_section_gives_each_axis_its_frequencies() -> None:
    axis = axis_of((24, 20, 20), 64).tolist()
    assert [axis.count(number) for number in range(3)] == [24, 20, 20]
    assert axis[:6] == [0, 1, 2, 0, 1, 2]
    assert axis[60:] == [0] * 4


def test_mrope_of_equal_axes_is_rope() -> None:
    positions = torch.arange(50)
    rope = Rotary(shape_with(rope_theta=1e6), torch.float32)(positions)
    for given in (positions, positions.expand(3, -1)):
        found = Rotary(shape_with(rope_theta=1e6, mrope_section=(24, 20, 20)), torch.float32)(given)
        assert torch.equal(found.cosines, rope.cosines)
        assert torch.equal(found.sines, rope.sines)


def test_the_gradient_of_turning_is_turning_back() -> None:
    angles = torch.rand(7, 1, 4, dtype=torch.float64)
    both = torch.cat((angles, angles), dim=-1)
    tables = RotaryTables(both.cos(), both.sin())
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tables.turn, (x,))
    back = RotaryTables(both.cos(), -both.sin())
    assert torch.allclose(back.turn(tables.turn(x)), x)
