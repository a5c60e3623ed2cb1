"""Lets Megatron-Core run without a GPU: its calls to torch.cuda and its "cuda" devices land on the CPU.

Nothing outside Megatron-Core is touched: its modules get a stand-in for the name `torch` that hands everything through
except devices, streams and random states. Two things it cannot reach are mended beside it: Megatron-Core tells number formats
apart by the names of CUDA tensor types (`name_types_as_cuda`), its all-to-all dispatcher keeps split sizes as tensors
when they lie on the CPU already, and gloo gathers and reduces equal pieces alone. Written against megatron-core 0.16.1; the
version is pinned.
"""

import contextlib
import ctypes
import functools
import resource
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of glibc's malloc.h."""

_NORM_PIECE = 2**10
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


class _Event:
    """An event that has happened already: CPU work is done when the call returns."""

    def synchronize(self) -> None:
        return None


class _Stream:
    """The one stream there is: everything on the CPU runs in program order."""

    def wait_stream(self, stream: "_Stream") -> None:
        return None

    def record_event(self, event: _Event | None = None) -> _Event:
        return _Event()


_STREAM = _Stream()


class _RandomModule(types.SimpleNamespace):
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


class _CpuCuda(types.ModuleType):
    """What Megatron-Core's modules see as `torch.cuda`."""

    random = _RandomModule()
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)
    current_device = staticmethod(lambda: CPU)
    is_available = staticmethod(lambda: False)
    synchronize = staticmethod(lambda device=None: None)
    empty_cache = staticmethod(lambda: None)
    current_stream = default_stream = staticmethod(lambda device=None: _STREAM)
    Stream = staticmethod(lambda *args, **kwargs: _STREAM)

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Any) -> Iterator[None]:
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


class _CpuTorch(types.ModuleType):
    """What Megatron-Core's modules see as `torch`."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_STAND_IN = _CpuTorch()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def memory_gib() -> float:
    """Most GiB that this process has held at once: of its GPU, or, without one, of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, where there is no GPU and the C library is glibc.

    By default it hands large blocks back to the system at once, and every tensor of some megabytes costs a page fault for each of
    its pages again: a third to half the time of an expert layer. The price is some memory that lies between blocks.
    """
    if torch.cuda.is_available() or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)  # from the heap, whatever the size
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # which never shrinks


def enable() -> None:
    """Point every Megatron-Core module imported so far at the CPU, where there is no GPU; call again after importing more."""
    if torch.cuda.is_available():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _STAND_IN  # type: ignore[attr-defined]
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.language_module import language_module
    from megatron.core.optimizer import distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Asked only when a tied embedding is copied to the last stage over GPUs; here both are filled by name.
    language_module.LanguageModule._is_in_embd_group = lambda self: False
    optimizer.clip_grad_by_total_norm_fp32 = _clip_gradients
    optimizer.get_grad_norm_fp32 = _gradient_norm
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _host_copy
    mappings._gather_along_first_dim = _gather_padded(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_padded(mappings._reduce_scatter_along_first_dim)
    param_and_grad_buffer.dist_reduce_scatter_func = _unless_alone(param_and_grad_buffer.dist_reduce_scatter_func)
    param_and_grad_buffer.dist_all_gather_func = _unless_alone(param_and_grad_buffer.dist_all_gather_func)
    sharded = distrib_optimizer.DistributedOptimizer
    sharded.get_parameter_state_dp_zero = _gathered_by_gloo(sharded.get_parameter_state_dp_zero)
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def name_types_as_cuda(parameters: Iterator[torch.nn.Parameter]) -> None:
    """Give parameters the CUDA names by which Megatron-Core's optimiser sorts them into 16- and 32-bit ones.

    float64 counts as full precision, so that a run can be repeated in float64 to tell a wrong layout from rounding.
    """
    if torch.cuda.is_available():
        return
    names = {
        torch.float16: "HalfTensor",
        torch.bfloat16: "BFloat16Tensor",
        torch.float32: "FloatTensor",
        torch.float64: "FloatTensor",
    }
    for parameter in parameters:
        parameter.type = functools.partial(str, f"torch.cuda.{names[parameter.dtype]}")  # type: ignore[method-assign, assignment]


def _gradient_norm(grads_for_norm: Any, norm_type: float = 2.0, grad_stats_parallel_group: Any = None) -> float:
    grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else grads_for_norm
    total = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        flat = grad.detach().flatten()
        whole = flat.numel() // _NORM_PIECE * _NORM_PIECE
        # Short sums in the gradient's own format and the sum of these in float64: as exact, and without a wide copy.
        total += torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_PIECE), dim=1).double().square().sum()
        total += torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()
    torch.distributed.all_reduce(total, group=grad_stats_parallel_group)
    return float(total.sqrt())


def _clip_gradients(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    coefficient = max_norm / (total_norm + 1e-6)
    if coefficient < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(coefficient)


def _gathered_by_gloo(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Every group is a gloo group here, so that optimiser states are gathered without a detour over a GPU."""
    if hasattr(gather, "__wrapped__"):
        return gather

    @functools.wraps(gather)
    def wrapped(optimizer: Any, use_gloo_comm: bool = True, **kwargs: Any) -> Any:
        optimizer.data_parallel_group_gloo = optimizer.data_parallel_group
        return gather(optimizer, use_gloo_comm=True, **kwargs)

    return wrapped


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A rank that is alone in its group has its part of a buffer already; gloo would copy it onto itself."""
    if hasattr(collective, "spares_the_alone"):
        return collective

    def wrapped(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    wrapped.spares_the_alone = True  # type: ignore[attr-defined]
    return wrapped


def _gather_padded(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Unequal pieces are filled up to the largest."""
    if hasattr(gather, "__wrapped__"):
        return gather

    @functools.wraps(gather)
    def wrapped(piece: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(piece, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        pieces = gather(_fill_up(piece, max(sizes)), group).chunk(len(sizes))
        return torch.cat([each[:size] for each, size in zip(pieces, sizes, strict=True)])

    return wrapped


def _reduce_scatter_padded(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    if hasattr(reduce_scatter, "__wrapped__"):
        return reduce_scatter

    @functools.wraps(reduce_scatter)
    def wrapped(whole: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        filled = torch.cat([_fill_up(piece, max(sizes)) for piece in whole.split(sizes)])
        return reduce_scatter(filled, group)[: sizes[group.rank()]]

    return wrapped


def _fill_up(piece: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((piece, piece.new_zeros(rows - len(piece), *piece.shape[1:])))


def _host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
