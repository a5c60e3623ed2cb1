"""Processes and their groups: torch.distributed and Megatron-Core's parallel state, started and stopped in one place."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.parallel import cpu
from moexpand.parallel.shape import Layout


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    world_rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    first_stage: bool
    last_stage: bool

    @property
    def main(self) -> bool:
        """Rank 0, which prints and writes what is written once."""
        return self.world_rank == 0


def start(layout: Layout, timeout_seconds: float = 600.0) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and build the model-parallel groups.

    Reads the rendezvous that torchrun put into the environment; without one, this process is a world of its own.

    Raises:
        InputError: the world's size does not fit the layout.
        EnvironmentFailure: the peers did not come within `timeout_seconds`.
    """
    assert not dist.is_initialized(), "ranks.start was called twice without ranks.stop between"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    for name, size in (
        ("TP x CP x PP", layout.tensor * layout.context * layout.pipeline),
        ("ETP x EP x PP", layout.expert_tensor * layout.expert * layout.pipeline),
    ):
        if world_size % size:
            raise InputError(f"{world_size} ranks cannot hold the layout: {name} = {size} does not divide them.")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
        else:
            dist.init_process_group("nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentFailure(f"The {world_size} ranks could not join within {timeout_seconds:g} s: {reason}") from error
    cpu.enable()
    cpu.keep_freed_memory()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.interleave if layout.interleave > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=gpu,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    # Weights are filled by name and there is no dropout; Megatron-Core still asks its tracker for a random state.
    model_parallel_cuda_manual_seed(0)
    return Ranks(
        world_rank=dist.get_rank(),
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        first_stage=parallel_state.is_pipeline_first_stage(),
        last_stage=parallel_state.is_pipeline_last_stage(),
    )


def lost_peer(error: BaseException) -> str | None:
    """What became of a peer, as the end of a sentence, where an error of a collective means that one is gone; None otherwise.

    gloo has no type for these errors: they are RuntimeErrors whose text begins with a file of gloo's.
    """
    text = str(error)
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)):
        return None
    if any(words in text for words in ("Timed out", "timed out", "Timeout")):
        return "did not answer in time (parallel.timeout_seconds)"
    if any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe", "Socket closed")):
        return "closed its connection"
    return "failed" if "NCCL error" in text else None


def stop() -> None:
    """Leave all groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this is rank 0."""
    return dist.get_rank() == 0


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of the ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=cpu.device())
    return values[0]


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place, on every rank."""
    dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def largest(*numbers: float) -> list[float]:
    """Of each number the largest of all ranks."""
    votes = torch.tensor(numbers, dtype=torch.float64, device=cpu.device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return votes.tolist()


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set on any rank."""
    return tuple(map(bool, largest(*map(float, flags))))
