"""Combinations of settings that cannot work, refused before any process starts; one sentence each, with the numbers and the fix.

What a single key may hold is in schema.py. Here are the rules between keys, and between keys and the model's own numbers,
which come as arguments. Nothing here imports torch.

Legend: TP tensor, CP context, PP pipeline, EP expert, ETP expert-tensor parallel size; DP data-parallel size.
"""

from typing import Protocol

from moexpand.base.errors import InputError
from moexpand.conf.check_encoders import Tower, check_deepstack
from moexpand.conf.check_launch import check_launch
from moexpand.conf.layers import layer_factors
from moexpand.conf.schema import CalibrateCommand
from moexpand.conf.train_schema import Balance, Optim, Parallel, Router, Train, TrainCommand


class Numbers(Protocol):
    """The numbers of a model that layouts depend on, under the names of its Hugging Face config.

    `schema.Model` has them, and so has the shape that training reads from a checkpoint. `num_experts` is 0 without experts.
    """

    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def router_n_groups(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def scoring_func(self) -> str: ...
    @property
    def vision(self) -> Tower | None: ...


def check_train(config: TrainCommand, model: Numbers, world_size: int, biased: bool = False) -> None:
    """Check everything that a training run needs to agree on.

    Args:
        config: the composed configuration.
        model: the checkpoint that training starts from, or the fresh model.
        world_size: ranks in all.
        biased: the routers that training starts or goes on from have a selection bias already.

    Raises:
        InputError: the first combination that cannot work.
    """
    check_experts(model)
    check_launch(config.launch)
    several = config.launch.nodes > 1
    workers = "launch.nodes*launch.processes" if several else "launch.processes"
    check_layout(config.parallel, model, config.precision.name, world_size, workers)
    check_batch(config.train, config.parallel, world_size)
    _check_schedule(config.optim, config.train.steps)
    _check_moments(config.optim)
    _check_router(config.router, model, config.train.steps)
    _check_balance(config.balance, model, biased)
    _check_track(config)
    _check_watchdog(config)
    if config.evaluate.every and not config.data.held_out:
        raise InputError(
            f"evaluate.every={config.evaluate.every} needs held-out samples and data.held_out is 0; give data.held_out=0.05."
        )


def check_calibrate(config: CalibrateCommand, model: Numbers, world_size: int) -> None:
    """Check that the layout fits the model, the ranks and the length of the sequences.

    Raises:
        InputError: the first combination that cannot work.
    """
    check_layout(config.parallel, model, config.precision.name, world_size, "processes")
    check_sequence("seq_length", config.seq_length, config.parallel)
    if config.parallel.context > 1:
        raise InputError(
            f"parallel.context={config.parallel.context} has no use here, where sequences are routed one by one; "
            "give parallel.context=1."
        )
    if not model.num_experts:
        raise InputError(f"{config.checkpoint} has no experts, so there is no routing to calibrate; give a parent with experts.")


def check_experts(model: Numbers) -> None:
    """Check that experts and top-k can be split over the groups."""
    experts, top_k, groups = model.num_experts, model.num_experts_per_tok, model.router_n_groups
    if not experts:
        return
    _multiple("num_experts", experts, "router_n_groups", groups, "every group holds as many experts")
    _multiple("num_experts_per_tok", top_k, "router_n_groups", groups, "a token visits as many experts of every group")
    if top_k > experts:
        raise InputError(f"num_experts_per_tok={top_k} is larger than num_experts={experts}; choose at most {experts}.")


def check_layout(parallel: Parallel, model: Numbers, precision: str, world_size: int, workers: str = "launch.processes") -> None:
    """Check a layout against the model, its number format and the number of ranks; `workers` is the command's key for that.

    Raises:
        InputError: the ranks or the model cannot be split like that, or the layout is not proven to compute the same.
    """
    tensor, context, pipeline, expert = parallel.tensor, parallel.context, parallel.pipeline, parallel.expert
    _ranks(world_size, workers, ("tensor", tensor), ("context", context), ("pipeline", pipeline))
    _ranks(world_size, workers, ("expert_tensor", parallel.expert_tensor), ("expert", expert), ("pipeline", pipeline))
    _check_stages(parallel, model.num_hidden_layers)
    check_deepstack(parallel, model.vision, model.num_hidden_layers)
    _multiple(
        "num_attention_heads",
        model.num_attention_heads,
        "num_key_value_heads",
        model.num_key_value_heads,
        "every key head serves as many query heads",
    )
    _multiple("num_attention_heads", model.num_attention_heads, "parallel.tensor", tensor, "every rank holds as many heads")
    _multiple(
        "num_key_value_heads",
        model.num_key_value_heads,
        "parallel.tensor",
        tensor,
        "every rank holds as many key and value heads",
    )
    _multiple("vocab_size", model.vocab_size, "parallel.tensor", tensor, "every rank holds as many rows of the embedding")
    if model.num_experts:
        _multiple("num_experts", model.num_experts, "parallel.expert", expert, "every rank holds as many experts")
        _multiple(
            "moe_intermediate_size",
            model.moe_intermediate_size,
            "parallel.expert_tensor",
            parallel.expert_tensor,
            "every rank holds as wide a part of each expert",
        )
        _check_products(parallel, model, precision)
        _check_dispatcher(parallel, model)
    elif expert > 1:
        raise InputError(f"parallel.expert={expert} splits experts and the model has none; give parallel.expert=1.")


def _check_products(parallel: Parallel, model: Numbers, precision: str) -> None:
    """torch's grouped matrix products take rows of whole 16 bytes."""
    numbers = 8 if precision == "bf16" else 4
    needed = f"is not a multiple of {numbers}, which grouped matrix products in {precision} need"
    if model.hidden_size % numbers:
        raise InputError(f"hidden_size={model.hidden_size} {needed}; choose another width.")
    split, inner = parallel.expert_tensor, model.moe_intermediate_size // parallel.expert_tensor
    if inner % numbers:
        share = f" / parallel.expert_tensor={split} = {inner}" if split > 1 else ""
        advice = "choose a smaller parallel.expert_tensor" if split > 1 else "choose another width"
        raise InputError(f"moe_intermediate_size={model.moe_intermediate_size}{share} {needed}; {advice}.")


def _check_stages(parallel: Parallel, layers: int) -> None:
    pipeline, interleave = parallel.pipeline, parallel.interleave
    if interleave > 1 and pipeline == 1:
        raise InputError(
            f"parallel.interleave={interleave} cuts pipeline stages in parts and parallel.pipeline=1; give parallel.interleave=1."
        )
    ends = {name: getattr(parallel, name) for name in ("first_layers", "last_layers") if getattr(parallel, name)}
    if ends:
        _check_ends(parallel, layers, ends)
        return
    if layers % (pipeline * interleave):
        parts = f"parallel.pipeline={pipeline}" + (f" x parallel.interleave={interleave}" if interleave > 1 else "")
        raise InputError(
            f"num_hidden_layers={layers} is not a multiple of {parts}, and every stage holds as many layers; "
            f"their product must be one of {_divisors(layers)}, or give parallel.first_layers or parallel.last_layers."
        )


def _check_ends(parallel: Parallel, layers: int, ends: dict[str, int]) -> None:
    """Stages of other sizes at the beginning and the end of the pipeline."""
    told = " and ".join(f"parallel.{name}={count}" for name, count in ends.items())
    if parallel.interleave > 1:
        raise InputError(f"{told} is for whole stages and parallel.interleave={parallel.interleave} cuts them; leave one out.")
    if parallel.pipeline == 1:
        raise InputError(f"{told} is for a pipeline of several stages and parallel.pipeline=1; leave it out.")
    between, rest = parallel.pipeline - len(ends), layers - sum(ends.values())
    if between < 0 or rest < between or (rest % between if between else rest):
        raise InputError(
            f"{told} of num_hidden_layers={layers} leave {rest} layers for {max(between, 0)} other stages of "
            f"parallel.pipeline={parallel.pipeline}, which hold equally many; choose other numbers."
        )


def _check_dispatcher(parallel: Parallel, model: Numbers) -> None:
    if parallel.dispatcher != "grouped_allgather":
        return
    if model.router_n_groups == 1:
        raise InputError(
            "parallel.dispatcher=grouped_allgather sends a token by its groups and the model has router_n_groups=1; "
            "give parallel.dispatcher=alltoall."
        )
    if model.router_n_groups % parallel.expert:
        raise InputError(
            f"parallel.dispatcher=grouped_allgather needs whole groups on every rank and parallel.expert={parallel.expert} does "
            f"not divide router_n_groups={model.router_n_groups}; choose one of {_divisors(model.router_n_groups)} "
            "or parallel.dispatcher=alltoall."
        )


def check_batch(train: Train, parallel: Parallel, world_size: int) -> None:
    """Check that the batch and its sequences can be split over the ranks.

    Raises:
        InputError: they cannot.
    """
    replicas = world_size // (parallel.tensor * parallel.context * parallel.pipeline)
    wave = train.micro_batch * replicas
    if train.global_batch % wave:
        lower, upper = train.global_batch // wave * wave, (train.global_batch // wave + 1) * wave
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise InputError(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch x data-parallel ranks = "
            f"{train.micro_batch} x {replicas} = {wave}; choose {near}."
        )
    micro_batches = train.global_batch // wave
    if parallel.interleave > 1 and micro_batches % parallel.pipeline:
        raise InputError(
            f"parallel.interleave={parallel.interleave} needs micro-batches in multiples of "
            f"parallel.pipeline={parallel.pipeline} and a data-parallel rank has {micro_batches} a step; choose "
            f"train.global_batch={wave * parallel.pipeline} or a multiple."
        )
    check_sequence("train.seq_length", train.seq_length, parallel)


def check_sequence(key: str, length: int, parallel: Parallel) -> None:
    """Check that a sequence can be split over the ranks that share it.

    Raises:
        InputError: it cannot.
    """
    context, tensor = parallel.context, parallel.tensor
    pieces = tensor * (2 * context if context > 1 else 1)
    if length % pieces:
        parts = f"2 x parallel.context={context} x parallel.tensor={tensor}" if context > 1 else f"parallel.tensor={tensor}"
        lower, upper = length // pieces * pieces, (length // pieces + 1) * pieces
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise InputError(f"{key}={length} is not a multiple of {parts}, over which the tokens are split evenly; choose {near}.")


def _check_router(router: Router, model: Numbers, steps: int) -> None:
    if router.gradient != "topk" and model.scoring_func == "sigmoid" and not model.norm_topk_prob:
        raise InputError(
            f"router.gradient={router.gradient} moves experts against each other, and scoring_func=sigmoid without "
            "norm_topk_prob weighs each alone; give router.gradient=topk."
        )
    if router.gradient == "topk" and router.temperature != 1.0:
        raise InputError(
            f"router.temperature={router.temperature} is that of a surrogate and router.gradient=topk has none; leave it out or "
            "give router.gradient=ste."
        )
    if router.gradient != "ste" and router.normalised:
        why = "needs no scaling" if router.gradient == "topk" else "is scaled like that always"
        raise InputError(
            f"router.normalised=true scales the gradient ste and router.gradient={router.gradient} {why}; leave it out or give "
            "router.gradient=ste."
        )
    if router.gradient != "default_vector" and router.default_decay != Router.default_decay:
        raise InputError(
            f"router.default_decay={router.default_decay} is that of default vectors and router.gradient={router.gradient} has "
            "none; leave it out or give router.gradient=default_vector."
        )
    if router.warmup_steps > steps:
        raise InputError(f"router.warmup_steps={router.warmup_steps} is more than train.steps={steps}.")


def _check_balance(balance: Balance, model: Numbers, biased: bool) -> None:
    if balance.bias_rate and not balance.selection_bias:
        raise InputError(
            f"balance.bias_rate={balance.bias_rate} moves a selection bias; give balance.selection_bias=true as well."
        )
    if balance.selection_bias and not balance.bias_rate and not biased:
        raise InputError(
            "balance.selection_bias=true starts a bias at 0 and balance.bias_rate=0 leaves it there; give a rate such as "
            "balance.bias_rate=1e-3 as well."
        )
    layer_factors("balance.layers", balance.layers, model.num_hidden_layers)
    if balance.layers and not (balance.coefficient or balance.group_coefficient or balance.z_loss):
        raise InputError(
            "balance.layers multiplies balance.coefficient, balance.group_coefficient and balance.z_loss, and all three are 0; "
            "leave it out or give one of them."
        )


def _check_watchdog(config: TrainCommand) -> None:
    seconds, timeout = config.watchdog.seconds, config.parallel.timeout_seconds
    if seconds >= timeout:
        raise InputError(
            f"watchdog.seconds={seconds:g} is not below parallel.timeout_seconds={timeout:g}, after which a wait for another "
            "rank fails anyway; choose a smaller one, or 0 for none."
        )


def _check_track(config: TrainCommand) -> None:
    track, train, parallel = config.track, config.train, config.parallel
    if not track.sibling_outputs:
        return
    if not track.siblings_every:
        raise InputError(
            f"track.sibling_outputs={track.sibling_outputs} is for the comparisons of siblings and track.siblings_every=0 makes "
            "none; leave it out or give track.siblings_every=100."
        )
    tokens = train.micro_batch * train.seq_length // (parallel.tensor * parallel.context)
    if track.sibling_outputs > tokens:
        raise InputError(
            f"track.sibling_outputs={track.sibling_outputs} is more than the {tokens} tokens that a rank has of a micro-batch "
            f"(train.micro_batch x train.seq_length / parallel.tensor / parallel.context); choose at most {tokens}."
        )


def _check_schedule(optim: Optim, steps: int) -> None:
    decay = optim.decay_steps if optim.schedule == "wsd" else 0
    if optim.warmup_steps + decay > steps:
        parts = f"optim.warmup_steps={optim.warmup_steps}" + (f" + optim.decay_steps={decay}" if decay else "")
        total = f"{parts} = {optim.warmup_steps + decay}" if decay else parts
        raise InputError(f"{total} is more than train.steps={steps}; choose a shorter warm-up or decay, or more steps.")
    if optim.min_lr > optim.lr:
        raise InputError(f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}; choose a smaller one.")


def _check_moments(optim: Optim) -> None:
    if optim.moments != "reset" and optim.moments_from is None:
        raise InputError(f"optim.moments={optim.moments} needs the parent's run; give optim.moments_from=FOLDER.")
    if optim.moments == "reset" and optim.moments_from is not None:
        raise InputError(
            f"optim.moments_from={optim.moments_from} is not read with optim.moments=reset; give optim.moments=copy or scale."
        )


def _multiple(name: str, number: int, of: str, divisor: int, why: str) -> None:
    if number % divisor:
        raise InputError(
            f"{name}={number} is not a multiple of {of}={divisor}, and {why}; choose one of {_divisors(number)} for {of}."
        )


def _ranks(world_size: int, workers: str, *sizes: tuple[str, int]) -> None:
    product = 1
    for _, size in sizes:
        product *= size
    if world_size % product:
        names = " x ".join(f"parallel.{name}" for name, _ in sizes)
        numbers = " x ".join(str(size) for _, size in sizes)
        raise InputError(
            f"{world_size} ranks cannot be split into {names} = {numbers} = {product}; "
            f"start a multiple of {product} workers ({workers}) or choose smaller sizes."
        )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, min(number, 128) + 1) if number % size == 0)
