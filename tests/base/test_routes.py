"""Routes of this model and these tokens pass, and every other kind is refused with one sentence that says what is wrong.

Legend: T tokens, L layers, E experts, G groups, K experts a token visits.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.base.routes import check_routes, compact

WHERE = "Routes of shard 3 in routes.npy"


@dataclass(frozen=True)
class Model:
    tokens: int
    layers: int
    size: int
    groups: int
    per_group: int
    seed: int

    @property
    def experts(self) -> int:
        return self.size * self.groups

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.tokens, self.layers, self.per_group * self.groups

    def routes(self) -> np.ndarray:
        """int64, columns in any order."""
        random = np.random.default_rng(self.seed)
        routes = np.zeros(self.shape, dtype=np.int64)
        for place in np.ndindex(self.shape[:2]):
            picks = [g * self.size + m for g in range(self.groups) for m in random.permutation(self.size)[: self.per_group]]
            routes[place] = random.permutation(picks)
        return routes

    def place(self) -> tuple[int, ...]:
        """Any token of any layer."""
        random = np.random.default_rng(self.seed + 1)
        return tuple(int(random.integers(length)) for length in self.shape[:2])


MODELS = st.builds(
    lambda per_group, size, **rest: Model(per_group=min(per_group, size), size=size, **rest),
    tokens=st.integers(1, 6),
    layers=st.integers(1, 4),
    size=st.sampled_from([1, 2, 3, 16, 60]),
    groups=st.sampled_from([1, 2, 4, 8]),
    per_group=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)


def refusal(model: Model, routes: np.ndarray) -> str:
    """The sentence, which names what was given."""
    with pytest.raises(InputError) as raised:
        check_routes(routes, model.shape, model.experts, model.groups, WHERE)
    sentence = str(raised.value)
    assert re.fullmatch(re.escape(WHERE) + r" [^\n]*[^.\n]\.", sentence)
    assert not re.search(r"[.!?]\s", sentence)
    return sentence


@settings(max_examples=80, deadline=None)
@given(MODELS, st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64, None]))
def test_routes_of_this_model_pass_and_stay_as_they_are(model: Model, dtype: type | None) -> None:
    kept = np.dtype(dtype) if dtype else compact(model.experts)
    assume(model.experts - 1 <= np.iinfo(kept).max)
    routes = model.routes().astype(kept)
    before = routes.copy()
    routes.flags.writeable = False
    check_routes(routes, model.shape, model.experts, model.groups, WHERE)
    assert np.array_equal(routes, before)


def test_the_first_and_the_last_expert_exist() -> None:
    check_routes(np.array([[[255, 0]]], dtype=np.uint8), (1, 1, 2), 256, 1, WHERE)
    check_routes(np.array([[[0, 65_535]]], dtype=np.uint16), (1, 1, 2), 65_536, 2, WHERE)


def test_no_tokens_have_good_routes() -> None:
    for dtype in (np.uint8, np.int64):
        check_routes(np.zeros((0, 3, 4), dtype=dtype), (0, 3, 4), 16, 4, WHERE)


@settings(max_examples=60, deadline=None)
@given(MODELS, st.integers(0, 2), st.sampled_from([-1, 1]))
def test_another_shape_is_refused_with_both_shapes(model: Model, axis: int, change: int) -> None:
    routes = model.routes()
    other = routes.take(range(routes.shape[axis] + change), axis=axis, mode="wrap")
    for wrong in (other, routes[..., None], routes.reshape(-1), routes[None]):
        sentence = refusal(model, wrong)
        assert str(list(wrong.shape)) in sentence
        assert str(list(model.shape)) in sentence


@settings(max_examples=30, deadline=None)
@given(MODELS, st.sampled_from([np.float16, np.float32, np.float64, np.bool_, np.complex64, np.str_, np.object_]))
def test_anything_but_whole_numbers_is_refused(model: Model, dtype: type) -> None:
    assert "whole numbers" in refusal(model, model.routes().astype(dtype))


@settings(max_examples=60, deadline=None)
@given(MODELS, st.sampled_from(["-1", "lowest", "first too many", "highest"]), st.sampled_from([np.int16, np.int32, np.int64]))
def test_experts_that_do_not_exist_are_refused(model: Model, kind: str, dtype: type) -> None:
    limits = np.iinfo(dtype)
    wrong = {"-1": -1, "lowest": limits.min, "first too many": model.experts, "highest": limits.max}[kind]
    routes = model.routes().astype(dtype)
    routes[model.place()][0] = wrong
    assert str(model.experts - 1) in refusal(model, routes)


def test_an_unsigned_number_beyond_every_signed_one_is_refused() -> None:
    model = Model(tokens=1, layers=1, size=4, groups=1, per_group=2, seed=0)
    for number in (2**32, 2**63, 2**64 - 1):
        assert "from 0 to 3" in refusal(model, np.array([[[0, number]]], dtype=np.uint64))


@settings(max_examples=60, deadline=None)
@given(MODELS, st.booleans())
def test_the_same_expert_twice_is_refused(model: Model, small: bool) -> None:
    assume(model.shape[-1] > 1)
    routes = model.routes().astype(compact(model.experts) if small else np.int64)
    first, second = np.random.default_rng(model.seed + 2).permutation(model.shape[-1])[:2]
    routes[model.place()][first] = routes[model.place()][second]
    assert "same expert twice" in refusal(model, routes)


@settings(max_examples=60, deadline=None)
@given(MODELS)
def test_too_many_experts_of_one_group_are_refused(model: Model) -> None:
    """Two experts change groups: one group gets one more than K / G and another one less, and no expert comes twice."""
    assume(model.groups > 1 and model.per_group < model.size)
    random = np.random.default_rng(model.seed + 2)
    routes = model.routes()
    row = routes[model.place()]
    giver, taker = random.permutation(model.groups)[:2]
    free = [e for e in range(taker * model.size, (taker + 1) * model.size) if e not in row]
    column = random.choice(np.flatnonzero(row // model.size == giver))
    row[column] = random.choice(free)
    refusal(model, routes)
    check_routes(routes, model.shape, model.experts, 1, WHERE)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 65_536))
def test_routes_are_kept_in_the_smallest_unsigned_integers_that_hold_the_experts(experts: int) -> None:
    kept = compact(experts)
    assert kept.kind == "u"
    assert np.iinfo(kept).max >= experts - 1
    assert kept.itemsize == (1 if experts - 1 <= 255 else 2)


def test_256_experts_fit_one_byte_and_257_do_not() -> None:
    assert compact(256) == np.uint8
    assert compact(257) == np.uint16
