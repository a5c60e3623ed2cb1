"""Features of time series in a decoder: logits and gradients are transformers' with the features in their places, every layout
equals one rank."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moexpand.base.series import tokens_of
from moexpand.parallel.shape import TimeSeriesShape
from moexpand.parallel.time_series import TimeSeriesEncoder
from tests.parallel import runs
from tests.processes import run_on_ranks

SERIES = 200
"""The token that holds a feature's place."""
TWO: dict[str, dict[str, Any]] = {
    "EP2": {"expert": 2},
    "DP2 overlap": {"overlap": True},
    "TP2": {"tensor": 2},
    "TP2 EP2 recomputed": {"tensor": 2, "expert": 2, "recompute": "full"},
    "CP2": {"context": 2},
    "PP2": {"pipeline": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "TP2 CP2": {"tensor": 2, "context": 2},
    "PP2 TP2": {"pipeline": 2, "tensor": 2},
}
Kept = tuple[Path, dict[str, torch.Tensor], TimeSeriesShape]


class SeriesMicro(runs.Micro):
    """Segments of text and series: `parts` are numbers of text tokens, or (points, channels, rate)."""

    def __init__(self, seed: int, segments: list[list[Any]]) -> None:
        drawn = np.random.default_rng(seed)
        made, masks = [], []
        self.series: list[np.ndarray] = []
        self.rates: list[float] = []
        for parts in segments:
            tokens: list[int] = []
            for part in parts:
                if isinstance(part, int):
                    tokens += drawn.integers(0, 190, part).tolist()
                    continue
                points, channels, rate = part
                tokens += [201, *[SERIES] * tokens_of(points, rate), 202]
                self.series.append(drawn.normal(size=(points, channels)).astype(np.float32))
                self.rates.append(rate)
            made.append(np.array(tokens))
            mask = (made[-1] != SERIES).astype(np.float32)
            mask[-1] = 0
            masks.append(mask)
        super().__init__(made, masks)


SEGMENTS: list[list[list[Any]]] = [
    [[3, (40, 2, 10.0), 8], [(1, 1, 1.0), 4, (30, 1, 0.5), 5]],
    [[30], [34]],
    [[2, (100, 3, 0.1), 8], [(300, 1, 180.0), 9]],
    [[(9, 2, 2.0), 4, (9, 2, 2.0), 5], [13]],
]
"""Four micro-batches: series of several lengths, channels and rates, none at all, two alike, one at a beginning."""


def micros() -> list[SeriesMicro]:
    made = []
    for number, segments in enumerate(SEGMENTS):
        length = len(SeriesMicro(number, segments).tokens)
        made.append(SeriesMicro(number, [*segments, [80 - length]] if length < 80 else segments))
        assert len(made[-1].tokens) == 80
    return made


@pytest.fixture(scope="module")
def kept(parent: Path) -> Kept:
    hidden = runs.shape_of(parent).hidden_size
    shape = TimeSeriesShape(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, max_source_positions=6, num_mel_bins=10,
        ts_adapt_in_dim=32, ts_hidden_dim=24, out_hidden_size=hidden, ts_token_id=SERIES, patch_heads=4, patch_ffn_dim=40,
        longest_patch=400,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = TimeSeriesEncoder(shape)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return parent, encoder.state_dict(), shape


def engine_of(kept: Kept, layout: dict[str, Any], precision: str = "fp32", rules: dict[str, Any] | None = None) -> Any:
    folder, state, shape = kept
    stored = runs.reader(folder)

    def read(name: str, rows: slice | None) -> torch.Tensor:
        own = name.removeprefix("model.time_series.")
        return stored(name, rows) if own == name else state[own]

    return runs.built_engine(runs.shape_of(folder, time_series=shape), read, layout, rules, precision)


def batches(built: Any) -> list[Any]:
    from moexpand.parallel.batch import PackedBatch

    own = micros()[built.ranks.data_rank :: built.ranks.data_size]
    return [PackedBatch.from_arrays(each, torch.device("cpu"), built.shape) for each in own]


def _transformers(kept: Kept) -> tuple[Any, TimeSeriesEncoder, list[torch.Tensor]]:
    """transformers' decoder, the encoder, and logits [T, V] of each micro-batch, each segment for itself."""
    from transformers import AutoModelForCausalLM

    folder, state, shape = kept
    model, encoder = AutoModelForCausalLM.from_pretrained(folder), TimeSeriesEncoder(shape)
    encoder.load_state_dict(state)
    logits = []
    for micro in micros():
        tokens = torch.from_numpy(micro.tokens)
        hidden = model.get_input_embeddings()(tokens)
        if micro.series:
            features = torch.cat(encoder([torch.from_numpy(each) for each in micro.series], micro.rates))
            hidden = hidden.masked_scatter((tokens == SERIES)[:, None], features)
        bounds = micro.cu_seqlens.tolist()
        pieces = [model(inputs_embeds=hidden[None, start:stop]).logits[0] for start, stop in pairwise(bounds)]
        logits.append(torch.cat(pieces))
    return model, encoder, logits


def _engine_logits(kept: Kept, layout: dict[str, Any], precision: str) -> list[np.ndarray] | None:
    with engine_of(kept, layout, precision) as built:
        outputs, _ = built.logits(batches(built))
        return [each.numpy() for each in outputs] if built.ranks.last_stage else None


def test_logits_are_those_of_transformers_with_the_features_in_their_places(kept: Kept) -> None:
    found = _engine_logits(kept, {}, "fp32")
    assert found is not None
    with torch.no_grad():
        for one, due in zip(found, _transformers(kept)[2], strict=True):
            assert np.abs(one - due.numpy()).max() < 1e-4


def test_every_gradient_is_that_of_transformers(kept: Kept) -> None:
    model, encoder, logits = _transformers(kept)
    masks = [torch.from_numpy(micro.loss_mask) for micro in micros()]
    total = sum(float(mask.sum()) for mask in masks)
    loss: Any = 0.0
    for micro, each, mask in zip(micros(), logits, masks, strict=True):
        losses = torch.nn.functional.cross_entropy(each, torch.from_numpy(micro.labels), reduction="none")
        loss = loss + (losses * mask).sum() / total
    loss.backward()
    with engine_of(kept, {}) as built:
        runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
        report = built.step(batches(built), 0.0)
        found = runs.merged([runs.held_blocks(built)])
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    due = {f"model.time_series.{name}": parameter.grad for name, parameter in encoder.named_parameters()}
    due["model.embed_tokens.weight"] = model.get_input_embeddings().weight.grad
    for name, gradient in due.items():
        assert gradient.abs().max() > 0, name
        assert runs.relative(found[name], gradient.numpy()) < 1e-4, name


def _gradients(kept: Kept, layouts: list[dict[str, Any]]) -> list[Any]:
    found = []
    for layout in layouts:
        with engine_of(kept, layout, "fp64", {"gradient": "ste"}) as built:
            runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
            report = built.step(batches(built), 0.0)
            found.append((runs.held_blocks(built), report.loss, report.grad_norm))
    return found


@pytest.mark.parametrize(
    ("size", "layouts"),
    [pytest.param(2, TWO, id="two ranks"), pytest.param(4, FOUR, id="four ranks", marks=pytest.mark.layouts)],
)
def test_every_layout_has_the_gradients_of_one_rank(kept: Kept, size: int, layouts: dict[str, dict[str, Any]]) -> None:
    ((blocks, loss, norm),) = _gradients(kept, [{}])
    due = runs.merged([blocks])
    answers = run_on_ranks(_gradients, size, kept, list(layouts.values()))
    for number, name in enumerate(layouts):
        found = runs.merged([answer[number][0] for answer in answers])
        assert found.keys() == due.keys()
        worst = max((runs.relative(found[key], value), key) for key, value in due.items() if np.abs(value).max() > 1e-12)
        assert worst[0] < 1e-9, (name, worst)
        assert answers[0][number][1:] == (pytest.approx(loss, rel=1e-12), pytest.approx(norm, rel=1e-9)), name


def _steps(kept: Kept, layout: dict[str, Any], rate: float, frozen: tuple[str, ...]) -> list[runs.Block]:
    """Weights after two steps."""
    from moexpand.parallel import optimizer, weights
    from moexpand.parallel.optimizer import Rates

    with engine_of(kept, layout, "fp64") as built:
        runs.prepare(built, clip_grad=0.0, frozen_parts=frozen)
        for _ in range(2):
            built.step(batches(built), Rates(1e-3, time_series=rate))
        with optimizer.weights_settled(built.wrapped):
            held = weights.parts(built.stages, built.shape)
            return [(part.name, part.shape, part.rows, part.columns, part.local.clone().numpy()) for part in held]


def test_the_encoder_has_a_learning_rate_of_its_own_or_stays(kept: Kept) -> None:
    usual, half, none, frozen = (
        runs.merged([_steps(kept, {}, rate, frozen)])
        for rate, frozen in ((1e-3, ()), (5e-4, ()), (0.0, ()), (1e-3, ("time_series",)))
    )
    for name, value in usual.items():
        if name.startswith("model.time_series.") and not name.endswith(".pe"):
            own = kept[1][name.removeprefix("model.time_series.")].double().numpy()
            assert np.array_equal(none[name], own)
            assert np.array_equal(frozen[name], own)
            assert 0 < np.abs(half[name] - own).max() < np.abs(value - own).max()
        else:
            assert np.abs(frozen[name] - none[name]).max() < 1e-12


def test_overlapped_steps_move_the_encoder_as_others_do(kept: Kept) -> None:
    """Every weight is waited for before it is used: the second step would be computed from stale ones."""
    due = runs.merged([_steps(kept, {}, 1e-3, ())])
    answers = run_on_ranks(_steps, 2, kept, {"overlap": True}, 1e-3, ())
    found = runs.merged(answers)
    for name, value in due.items():
        assert np.abs(found[name] - value).max() < 1e-9, name


def _restored(kept: Kept, folder: Path, save: dict[str, Any], load: dict[str, Any]) -> bool:
    return runs.restored(partial(engine_of, kept), batches, "time_series", folder, save, load)


@pytest.mark.parametrize(("save", "load"), [({"tensor": 2}, {"pipeline": 2}), ({"context": 2}, {})])
def test_checkpoints_keep_the_encoder_for_every_layout(
    kept: Kept, tmp_path: Path, save: dict[str, Any], load: dict[str, Any]
) -> None:
    assert run_on_ranks(_restored, 2, kept, tmp_path / "saved", save, load) == [True, True]
