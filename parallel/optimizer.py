"""Megatron-Core's distributed optimiser around AdamW, and its data-parallel wrapper."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import optimizer as megatron_optimizer

from moexpand.parallel import cpu
from moexpand.parallel.stage import Stage


@dataclass(frozen=True)
class AdamSettings:
    """AdamW; matrices decay, vectors (norms) do not."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    frozen_routers: bool = False
    """The routers' weights stay; their gradients must be zero."""
    frozen_parts: tuple[str, ...] = ()
    """Parts (keys of `PARTS`, or `decoder` for all else) that have no gradients and stay."""


@dataclass(frozen=True)
class Rates:
    """Learning rates by part; None is that of the decoder."""

    decoder: float
    routers: float | None = None
    tower: float | None = None
    projector: float | None = None
    time_series: float | None = None


PARTS = {
    "projector": ("vision.merger.", "vision.deepstack_merger_list."),
    "tower": ("vision.",),
    "time_series": ("time_series.",),
}
"""Beginnings of the names, in a stage, of parameters that have a learning rate of their own; the first that fits counts."""

_TAGS = {"tower": 2.0, "projector": 3.0, "time_series": 4.0}
"""Megatron-Core tells parameter groups apart by a few of their fields; `lr_mult`, which is not used as such, marks ours."""


def part_of(name: str) -> str:
    """The part that a stage's parameter belongs to: a key of `PARTS`, or `decoder`."""
    return next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), "decoder")


def freeze(stages: Sequence[Stage], parts: tuple[str, ...]) -> None:
    """Take parts out of training, before the stages are wrapped."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(part_of(name) not in parts)


def wrap(stages: Sequence[Stage], overlap: bool) -> list[DistributedDataParallel]:
    """Data parallelism with gradient buffers in fp32 (or wider); gradients are sums, divided by the step's tokens at the end.

    Args:
        overlap: reduce gradients while the backward pass still runs, gather weights while the next forward pass runs.
    """
    config = stages[0].config
    wide = torch.promote_types(config.params_dtype, torch.float32) == torch.float32
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=wide,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=settings, module=stage, disable_bucketing=number > 0)
        for number, stage in enumerate(stages)
    ]
    no_sync = [each.no_sync for each in wrapped]
    config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


@contextmanager
def weights_settled(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, the weights are whole on every rank: overlapped gathers of the last step have ended."""
    waiting = [each for each in wrapped if each.ddp_config.overlap_param_gather]
    for each in waiting:
        each.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for each in waiting:
            each.enable_forward_pre_hook()


def build(wrapped: Sequence[DistributedDataParallel], settings: AdamSettings) -> Any:
    """The optimiser over all parameters, its states split over data-parallel ranks (experts: expert-data-parallel ranks).

    Routers are a parameter group of their own, told by Megatron-Core's `is_decoupled_lr`; so are the keys of `PARTS`.
    """
    dtype = wrapped[0].config.params_dtype
    cpu.enable()
    for each in wrapped:
        cpu.name_types_as_cuda(each.parameters())
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=settings.clip_grad,
    )
    own: dict[ParamKey, dict[str, Any]] = {ParamKey(name="*.mlp.router.weight"): {"is_decoupled_lr": True}}
    for part, tag in _TAGS.items():
        names = [name for each in wrapped for name, _ in each.named_parameters() if part_of(name.removeprefix("module.")) == part]
        if names:
            own[ParamKey(name=tuple(names))] = {"lr_mult": tag}
    optimizer = get_megatron_optimizer(
        config,
        list(wrapped),
        config_overrides=get_standard_config_overrides(config) | own,
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    if dtype == torch.float64:
        for part in optimizer.chained_optimizers:
            part._copy_model_grads_to_main_grads = partial(_copy_gradients, part)
    apply_settings(optimizer, settings)
    return optimizer


def apply_settings(optimizer: Any, settings: AdamSettings) -> None:
    """Put AdamW's settings into all parameter groups; loading a checkpoint brings those of the run that saved it."""
    for group in optimizer.param_groups:
        if "foreach" in group:  # torch's AdamW: one fused pass over each parameter instead of a dozen
            group["fused"], group["foreach"] = True, False
        decays = not (settings.frozen_routers and group["is_decoupled_lr"])
        group["weight_decay"] = settings.weight_decay * group["wd_mult"] * decays
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps


def update(optimizer: Any, refused: Callable[[float], str]) -> tuple[float, str]:
    """Clip and apply the gradients; where they are refused the weights, the moments and Adam's step count stay.

    Args:
        refused: says why not, given the gradient norm before clipping, which is the same on all ranks.

    Returns:
        That norm, and why the weights were not updated (empty when they were).
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    why = refused(norm)
    if why:
        return norm, why
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and not part.is_stub_optimizer:
            # Looked up here, as cpu.enable() puts another one in its place.
            megatron_optimizer.clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
    _apply(optimizer.chained_optimizers)
    return norm, ""


def _apply(parts: Sequence[Any]) -> None:
    """Update the weights, and gather them once: each of Megatron-Core's chained optimisers would gather those of all of them."""
    for number, part in enumerate(parts):
        chunks = part.model_chunks
        if number < len(parts) - 1:
            part.model_chunks = []
        try:
            part.step_with_ready_grads()
        finally:
            part.model_chunks = chunks


def _copy_gradients(optimizer: Any) -> None:
    """Megatron-Core's copy of gradients to the optimiser's shards, without its cast to fp32 (float64 runs alone)."""
    for parameters, shards in zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True):
        for parameter, shard in zip(parameters, shards, strict=True):
            held = optimizer._get_model_param_range_map(parameter)["param"]
            shard.grad = parameter.main_grad.view(-1)[held.start : held.end]


def set_learning_rates(optimizer: Any, rates: Rates) -> None:
    """Set the learning rate of every part."""
    own = {"router": rates.routers, **{part: getattr(rates, part) for part in _TAGS}}
    part_of_tag = {tag: part for part, tag in _TAGS.items()}
    for group in optimizer.param_groups:
        rate = own.get("router" if group["is_decoupled_lr"] else part_of_tag.get(group["lr_mult"], "decoder"))
        group["lr"] = rates.decoder if rate is None else rate
