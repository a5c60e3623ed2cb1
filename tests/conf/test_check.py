"""Combinations that cannot work are refused with their numbers and a fix; those that can work pass."""

from contextlib import nullcontext
from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.conf.check import check_experts, check_layout, check_train
from moexpand.conf.check_encoders import check_vision
from moexpand.conf.compose import compose
from moexpand.conf.model_schema import Model, VisionModel
from moexpand.conf.train_schema import Parallel, TrainCommand


def config(*overrides: str) -> TrainCommand:
    return compose("train", ["run.dir=r", "data.shards=s", *overrides])  # type: ignore[no-any-return]


def refused(world_size: int, *overrides: str) -> str:
    given_config = config(*overrides)
    with pytest.raises(InputError) as caught:
        check_train(given_config, given_config.model, world_size)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, ["parallel=ep2"]),
        (4, ["parallel=ep2"]),
        (4, ["parallel=ep4", "parallel.dispatcher=grouped_allgather", "model.router_n_groups=8"]),
        (2, ["parallel=pp2"]),
        (4, ["parallel=pp2_ep2"]),
        (2, ["parallel=tp2_ep2"]),
        (4, ["parallel.tensor=2", "parallel.expert=4"]),
        (1, ["optim.warmup_steps=50", "optim.decay_steps=50"]),
        (1, ["optim.schedule=cosine", "optim.decay_steps=100", "optim.warmup_steps=9"]),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.context=2"]),
        (4, ["parallel.expert_tensor=2", "parallel.expert=2"]),
        (2, ["parallel=pp2", "parallel.interleave=2"]),
        (1, ["balance.selection_bias=true", "balance.bias_rate=1e-3", "balance.layers=[0-1x4,3x0.5]"]),
        (1, ["router.gradient=default_vector", "router.default_decay=0.5", "router.temperature=2"]),
        (1, ["router.normalised=true", "router.temperature=0.5"]),
        (1, ["balance.layers=[0x2]", "balance.coefficient=0", "balance.z_loss=1e-3"]),
        (2, ["track.sibling_outputs=1024", "parallel.tensor=2", "train.micro_batch=2"]),
    ],
)
def test_layouts_that_work_pass(world_size: int, overrides: list[str]) -> None:
    given_config = config(*overrides)
    check_train(given_config, given_config.model, world_size)


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (1, ["model.router_n_groups=3"], "num_experts=128 is not a multiple of router_n_groups=3"),
        (1, ["model.router_n_groups=16"], "num_experts_per_tok=8 is not a multiple of router_n_groups=16"),
        (1, ["model.num_experts=4"], "num_experts_per_tok=8 is larger than num_experts=4"),
        (3, ["parallel.expert=3"], "num_experts=128 is not a multiple of parallel.expert=3"),
        (
            3,
            ["parallel=ep2"],
            "3 ranks cannot be split into parallel.expert_tensor x parallel.expert x parallel.pipeline = 1 x 2 x 1 = 2",
        ),
        (
            3,
            ["parallel=tp2_ep2"],
            "3 ranks cannot be split into parallel.tensor x parallel.context x parallel.pipeline = 2 x 1 x 1 = 2",
        ),
        (1, ["parallel.last_layers=4"], "parallel.last_layers=4 is for a pipeline of several stages"),
        (2, ["parallel=pp2", "parallel.last_layers=4"], "leave 0 layers for 1 other stages of parallel.pipeline=2"),
        (2, ["parallel=pp2", "model.num_hidden_layers=3"], "num_hidden_layers=3 is not a multiple of parallel.pipeline=2"),
        (4, ["parallel.tensor=4", "parallel.expert=4"], "num_key_value_heads=2 is not a multiple of parallel.tensor=4"),
        (1, ["model.num_key_value_heads=3"], "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        (2, ["parallel=tp2_ep2", "model.vocab_size=8449"], "vocab_size=8449 is not a multiple of parallel.tensor=2"),
        (2, ["parallel=tp2_ep2", "train.seq_length=255"], "train.seq_length=255 is not a multiple of parallel.tensor=2"),
        (
            2,
            ["parallel.context=2", "train.seq_length=1026"],
            "train.seq_length=1026 is not a multiple of 2 x parallel.context=2 x parallel.tensor=1, over which the tokens are "
            "split evenly; choose 1024 or 1028.",
        ),
        (5, ["parallel.expert_tensor=5"], "moe_intermediate_size=48 is not a multiple of parallel.expert_tensor=5"),
        (
            4,
            ["parallel.expert_tensor=4", "precision.name=bf16"],
            "moe_intermediate_size=48 / parallel.expert_tensor=4 = 12 is not a multiple of 8, which grouped matrix products in "
            "bf16 need; choose a smaller parallel.expert_tensor.",
        ),
        (1, ["model.hidden_size=190"], "hidden_size=190 is not a multiple of 4, which grouped matrix products in fp32 need"),
        (1, ["parallel.interleave=2"], "parallel.interleave=2 cuts pipeline stages in parts and parallel.pipeline=1"),
        (
            2,
            ["parallel=pp2", "parallel.interleave=4"],
            "num_hidden_layers=4 is not a multiple of parallel.pipeline=2 x parallel.interleave=4, and every stage",
        ),
        (
            2,
            ["parallel=pp2", "parallel.interleave=2", "train.global_batch=3"],
            "a data-parallel rank has 3 a step; choose train.global_batch=2 or a multiple.",
        ),
        (1, ["balance.bias_rate=1e-3"], "balance.bias_rate=0.001 moves a selection bias; give balance.selection_bias=true"),
        (1, ["balance.selection_bias=true"], "balance.bias_rate=0 leaves it there; give a rate such as balance.bias_rate=1e-3"),
        (
            1,
            ["router.gradient=topk", "router.temperature=0.5"],
            "router.temperature=0.5 is that of a surrogate and router.gradient",
        ),
        (1, ["router.gradient=topk", "router.normalised=true"], "router.gradient=topk needs no scaling; leave it out or give"),
        (
            1,
            ["router.gradient=default_vector", "router.normalised=true"],
            "router.gradient=default_vector is scaled like that always",
        ),
        (1, ["router.default_decay=0.5"], "router.default_decay=0.5 is that of default vectors and router.gradient=ste has none"),
        (
            1,
            ["balance.layers=[0x2]", "balance.coefficient=0"],
            "balance.layers multiplies balance.coefficient, balance.group_coefficient and balance.z_loss, and all three are 0",
        ),
        (1, ["track.sibling_outputs=8", "track.siblings_every=0"], "track.siblings_every=0 makes none"),
        (
            2,
            ["track.sibling_outputs=1025", "parallel.tensor=2", "train.micro_batch=2"],
            "track.sibling_outputs=1025 is more than the 1024 tokens that a rank has of a micro-batch (train.micro_batch x "
            "train.seq_length / parallel.tensor / parallel.context); choose at most 1024.",
        ),
        (1, ["router.warmup_steps=101"], "router.warmup_steps=101 is more than train.steps=100"),
        (1, ["balance.layers=[4x2]"], "balance.layers holds '4x2' and the layers of this model are 0 to 3."),
        (1, ["balance.layers=[0-2x2,1x3]"], "balance.layers names layer 1 twice."),
        (1, ["balance.layers=[one]"], "balance.layers holds 'one'; write LAYERxFACTOR or FIRST-LASTxFACTOR"),
        (
            1,
            ["model.scoring_func=sigmoid", "model.norm_topk_prob=false"],
            "router.gradient=ste moves experts against each other, and scoring_func=sigmoid without norm_topk_prob",
        ),
        (2, ["parallel=ep2", "parallel.dispatcher=grouped_allgather"], "the model has router_n_groups=1"),
        (
            8,
            ["parallel=ep8", "parallel.dispatcher=grouped_allgather", "model.router_n_groups=4"],
            "parallel.expert=8 does not divide router_n_groups=4; choose one of 1, 2, 4",
        ),
        (4, ["train.global_batch=6"], "train.micro_batch x data-parallel ranks = 1 x 4 = 4; choose 4 or 8."),
        (1, ["train.global_batch=2", "train.micro_batch=3"], "= 3 x 1 = 3; choose 3."),
        (1, ["optim.warmup_steps=60", "optim.decay_steps=41"], "= 101 is more than train.steps=100"),
        (1, ["optim.schedule=cosine", "optim.warmup_steps=101"], "optim.warmup_steps=101 is more than train.steps=100"),
        (1, ["optim.min_lr=0.1"], "optim.min_lr=0.1 is above optim.lr=0.001"),
        (1, ["evaluate.every=5", "data.held_out=0"], "evaluate.every=5 needs held-out samples"),
    ],
)
def test_impossible_combination_is_one_sentence_with_its_numbers(world_size: int, overrides: list[str], expected: str) -> None:
    assert expected in refused(world_size, *overrides)


def test_a_bias_that_is_there_already_may_stay_as_it_is() -> None:
    frozen = config("balance.selection_bias=true")
    check_train(frozen, frozen.model, 1, biased=True)


@pytest.mark.parametrize(
    ("parallel", "first"),
    [
        (Parallel(pipeline=2), 4),
        (Parallel(pipeline=2, interleave=2), 2),
        (Parallel(pipeline=2, first_layers=3), 3),
        (Parallel(pipeline=3, last_layers=2), 3),
        (Parallel(pipeline=8), 1),
    ],
)
def test_layers_that_take_deepstacks_features_are_where_the_tower_is(parallel: Parallel, first: int) -> None:
    for deep in (first, first + 1):
        model = Model(num_hidden_layers=8, vision=VisionModel(deepstack_visual_indexes=[*range(deep)]))
        fits = deep == first
        with (
            nullcontext() if fits else pytest.raises(InputError, match=f"first {deep} layers, and .* the first part has {first};")
        ):
            check_layout(parallel, model, "fp32", parallel.pipeline)


def test_dense_model_has_no_experts_to_split() -> None:
    dense = Model(num_experts=0)
    check_layout(Parallel(tensor=2), dense, "fp32", 2)
    with pytest.raises(InputError, match="the model has none"):
        check_layout(Parallel(expert=2), dense, "fp32", 2)


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 12))
def test_groups_pass_exactly_when_both_can_be_split(experts: int, top_k: int, groups: int) -> None:
    fits = experts % groups == 0 and top_k % groups == 0 and top_k <= experts
    try:
        check_experts(Model(num_experts=experts, num_experts_per_tok=top_k, router_n_groups=groups))
    except InputError:
        assert not fits
    else:
        assert fits


def test_any_object_with_hugging_face_names_will_do() -> None:
    @dataclass(frozen=True)
    class FromCheckpoint:
        hidden_size: int = 192
        num_experts: int = 512
        num_experts_per_tok: int = 8
        router_n_groups: int = 8
        num_hidden_layers: int = 4
        num_attention_heads: int = 4
        num_key_value_heads: int = 2
        vocab_size: int = 8448
        moe_intermediate_size: int = 48
        norm_topk_prob: bool = True
        scoring_func: str = "softmax"
        vision: None = None

    names = {field.name for field in fields(FromCheckpoint)}
    assert names <= {field.name for field in fields(Model)}
    check_train(config("parallel=ep8", "parallel.dispatcher=grouped_allgather"), FromCheckpoint(), 8)


class _Tower:
    deepstack_visual_indexes = ()


@pytest.mark.parametrize(
    ("overrides", "encoder", "says"),
    [
        (["vision.freeze=[tower,projector,decoder]"], True, ""),
        (["vision.freeze=[tower,projector,decoder]"], False, "leaves nothing that learns"),
        (["vision.freeze=[tower,projector,decoder]", "time_series.freeze=true"], True, "leaves nothing that learns"),
        (["vision.freeze=[tower,projector]", "vision.warmup_steps=3"], True, ""),
        (["vision.freeze=[tower,projector]", "vision.warmup_steps=3"], False, "trains tower and projector, and both are frozen"),
    ],
)
def test_an_encoder_of_time_series_may_learn_alone(overrides: list[str], encoder: bool, says: str) -> None:
    with pytest.raises(InputError, match=says) if says else nullcontext():
        check_vision(config(*overrides), _Tower(), encoder)
