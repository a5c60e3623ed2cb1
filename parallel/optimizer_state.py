"""The optimiser's states as pieces of the whole model, which every rank saves and loads for itself.

Megatron-Core's distributed optimiser gives each data-parallel rank a flat stretch of every parameter. Its own formats either
gather the stretches on one rank before a save, or tie the files to the layout. Here a stretch is cut into boxes of the parameter,
and torch's distributed checkpoints store boxes and load them by any other division: no data is exchanged, on any layout.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PREFIX = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins in a tensor, and its sizes."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut elements `start` ... `stop` - 1 of a tensor, into boxes that follow each other: at most 2n - 1 for n axes."""
    if start == stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _in_row(shape, start // row, start, stop)
        return
    yield from _in_row(shape, start // row, start, first_whole * row)
    if first_whole < last_whole:
        yield (first_whole, *[0] * (len(shape) - 1)), (last_whole - first_whole, *shape[1:])
    yield from _in_row(shape, last_whole, last_whole * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    before = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *size)


def parts(optimizer: Any) -> list[DistributedOptimizer]:
    """Megatron-Core's optimisers of dense and of expert parameters that hold anything on this rank."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def sharded(optimizer: Any, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Master weights and moments of this rank, each box under its place in the whole model; their data are the states themselves.

    Args:
        model_state: the stages' sharded tensors, which say where a parameter lies in the whole model.
    """
    places = {id(tensor.data): tensor for part in model_state.values() for tensor in part.values()}
    found = {}
    for part in parts(optimizer):
        for parameter, (group, position) in part.model_param_group_index_map.items():
            place = places[id(parameter)]
            span = part._get_model_param_range_map(parameter)["param"]
            shard = part.optimizer.param_groups[group]["params"][position]
            states = {name: part.optimizer.state[shard][name] for name in MOMENTS}
            if shard.data_ptr() != parameter.data_ptr() + span.start * parameter.itemsize:
                states["param"] = shard  # in full precision it is the weight itself
            for name, flat in states.items():
                for number, piece in enumerate(
                    _pieces(place, f"{PREFIX}.{name}.{place.key}", flat.detach(), span.start, span.end)
                ):
                    found[f"{piece.key}.{place.global_offset}.{number}"] = piece
    return found


def _pieces(place: ShardedTensor, key: str, flat: torch.Tensor, start: int, stop: int) -> Iterator[ShardedTensor]:
    """The boxes of a flat stretch of a parameter, as views of it."""
    outer, done = place.prepend_axis_num, 0
    for offset, size in boxes(tuple(place.local_shape), start, stop):
        data = flat[done : done + math.prod(size)].view(*[1] * outer, *size)
        done += math.prod(size)
        yield ShardedTensor(
            key=key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=tuple(place.global_shape),
            global_offset=tuple(
                begin + inside for begin, inside in zip(place.global_offset, [*[0] * outer, *offset], strict=True)
            ),
            axis_fragmentations=None,  # boxes are no regular grid
            replica_id=(*place.replica_id[:2], 0),  # of replicas by data-parallel rank, each rank has other elements
        )


def initialise(optimizer: Any) -> None:
    """Give every parameter its moments (zero), which torch's AdamW makes at its first step alone."""
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                if not part.optimizer.state[shard]:
                    part.optimizer.state[shard] = {
                        "step": torch.tensor(0.0, device=shard.device),
                        **{name: torch.zeros_like(shard) for name in MOMENTS},
                    }


def adam_step(optimizer: Any) -> float:
    """Number of updates that AdamW has made (0 before the first)."""
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            return float(state["step"])
    return 0.0


def set_adam_step(optimizer: Any, step: float) -> None:
    """Set the number of updates of every parameter."""
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(step, dtype=torch.float32, device=state["exp_avg"].device)
