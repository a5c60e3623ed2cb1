"""What an engine really holds: numbers of parameters, bytes of buffers and states, of saved tensors, and of a step's peak."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SHAPE = {
    "vocab_size": 512, "hidden_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "router_n_groups": 4,
}  # fmt: skip
TOKENS = 256


@dataclass(frozen=True)
class Measured:
    """Of one rank; bytes, but for the numbers of parameters.

    Attributes:
        dense, experts: parameters.
        weights, gradients, optimiser: what is held of them.
        saved: tensors that the backward pass of one micro-batch keeps, each storage once, without weights and buffers.
        peak: most bytes beyond what was held before, at any moment of the step's forward and backward passes.
    """

    dense: int
    experts: int
    weights: int
    gradients: int
    optimiser: int
    saved: int
    peak: int


def measure(layout: dict[str, Any], precision: str, layers: int, tokens: int = TOKENS, micro_batches: int = 1) -> Measured:
    """Build an engine on this rank, take a step, and look. Experts are not filled up to equal rows, as on a GPU."""
    from moexpand.parallel import rows

    rows._capacities = lambda *unused: None  # type: ignore[assignment]
    with trained(layout, precision, layers, tokens, micro_batches) as (engine, batches):
        parameters = [parameter for stage in engine.stages for parameter in stage.parameters()]
        experts = sum(parameter.numel() for parameter in parameters if not getattr(parameter, "allreduce", True))
        buffers = [each for wrapped in engine.wrapped for each in wrapped.buffers + wrapped.expert_parallel_buffers]
        return Measured(
            dense=sum(parameter.numel() for parameter in parameters) - experts,
            experts=experts,
            weights=sum(parameter.nbytes for parameter in parameters),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            optimiser=_states(engine, parameters),
            saved=_saved(engine, batches),
            peak=min(_peak(engine, batches) for _ in range(4)),
        )


@contextmanager
def trained(
    layout: dict[str, Any], precision: str, layers: int, tokens: int, micro_batches: int
) -> Iterator[tuple[Any, list[Any]]]:
    """An engine that has made a step, which makes the optimiser's states, and its micro-batches."""
    from moexpand.parallel.shape import ModelShape
    from moexpand.train.weights import fresh
    from moexpand.upcycle.architecture import Architecture
    from tests.parallel.runs import built_engine, micro_batch, on_device, prepare

    read = fresh(Architecture(num_hidden_layers=layers, **SHAPE), seed=0)  # type: ignore[arg-type]
    shape = ModelShape(num_hidden_layers=layers, **SHAPE)  # type: ignore[arg-type]
    with built_engine(shape, read, layout, {"gradient": "ste", "balance_coefficient": 1e-3}, precision) as engine:
        prepare(engine)
        batches = on_device([micro_batch(number, tokens, SHAPE["vocab_size"]) for number in range(micro_batches)])
        engine.step(batches, 1e-3)
        yield engine, batches


def _states(engine: Any, parameters: list[Any]) -> int:
    """Master weights and moments; fp32 weights that are their own masters count once, as weights."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    own |= {each.param_data.untyped_storage().data_ptr() for wrapped in engine.wrapped for each in wrapped.buffers}
    own |= {
        each.param_data.untyped_storage().data_ptr() for wrapped in engine.wrapped for each in wrapped.expert_parallel_buffers
    }
    found: dict[int, int] = {}
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                for tensor in (master, *part.optimizer.state[master].values()):
                    if torch.is_tensor(tensor) and tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own:
                        found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def _saved(engine: Any, batches: list[Any]) -> int:
    import torch

    own = {each.untyped_storage().data_ptr() for stage in engine.stages for each in (*stage.parameters(), *stage.buffers())}
    seen: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine._run(engine.wrapped, batches, False, None)
    return sum(storage.nbytes() for storage in seen.values())


def _peak(engine: Any, batches: list[Any]) -> int:
    """From the profiler's events of the CPU's allocator."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine._run(engine.wrapped, batches, False, None)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def travelled(layout: dict[str, Any], layers: int, micro_batches: int) -> dict[str, int]:
    """Bytes that this rank sends in a step, by collective, as rings do; those of less than a hundred numbers are left out."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    sent: dict[str, int] = {}

    def tensors(argument: Any) -> list[Any]:
        if isinstance(argument, torch.Tensor):
            return [argument]
        return [each for one in argument for each in tensors(one)] if isinstance(argument, list | tuple) else []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            name = str(function)
            if name.startswith("c10d."):
                first, second = (sum(each.nbytes for each in tensors(argument)) for argument in (*arguments[:2], [])[:2])
                elements = sum(each.numel() for each in tensors(arguments[0]))
                if elements < 100 or "recv" in name or "barrier" in name:
                    amount = 0
                elif "allgather" in name or "reduce_scatter" in name:
                    amount = abs(first - second)  # all ranks' share less one's own
                elif "alltoall" in name:
                    amount = second - second // layout.get("expert", 1)
                elif "allreduce" in name:
                    amount = 0 if elements < 10_000 else 2 * (first - first // here.world_size)
                else:
                    amount = first
                sent[name] = sent.get(name, 0) + amount
            return function(*arguments, **(options or {}))

    with trained(layout, "fp32", layers, TOKENS, micro_batches) as (engine, batches):
        here = engine.ranks
        with Listen():
            engine.step(batches, 1e-3)
    return {name: amount for name, amount in sent.items() if amount}
