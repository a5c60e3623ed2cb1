"""One rank's file of a checkpoint, written in torch's distributed format by a thread while training goes on.

Megatron-Core plans what each rank writes and collects what it wrote; in between its own writer forks processes and starts a
manager. This one copies the tensors into a buffer of main memory that is kept from save to save, and writes them from a thread:
the file operations, checksums and copies of large blocks run without Python's lock.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.utils import serialization

from moexpand.base.errors import EnvironmentFailure
from moexpand.base.failpoints import failpoint
from moexpand.base.files import Fact, HashedFile, disk_errors
from moexpand.parallel import ranks

_ALIGNMENT = 64


class Buffer:
    """Main memory for one copy of what a rank saves, page-locked where there is a GPU; it grows and is never given back."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: list[torch.Tensor], ready: torch.cuda.Event | None) -> list[torch.Tensor]:
        """The tensors' values of this moment, until the next call.

        Args:
            ready: on a GPU, when the values are those to copy; the copy runs beside what is computed meanwhile.
        """
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if self._bytes.numel() < sum(sizes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # given back before more is taken
            self._bytes = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=ready is not None)
        places = [
            piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for piece, tensor in zip(self._bytes[: sum(sizes)].split(sizes), tensors, strict=True)
        ]
        with _beside(tensors, ready):
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=ready is not None)
        return places


@contextmanager
def _beside(tensors: list[torch.Tensor], ready: torch.cuda.Event | None) -> Iterator[None]:
    """A stream of its own on the tensors' GPU, from `ready` on; at the end all work in it is done."""
    if ready is None or not tensors:
        yield
        return
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cuda"))
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda.current_stream().wait_event(ready)
        yield
        torch.cuda.current_stream().synchronize()


@dataclass
class Written:
    """What this rank's file holds: torch's records of its tensors, its size and checksum; or why it could not be written."""

    results: list[Any]
    fact: Fact | None = None
    failure: str = ""


class RankFile(FileSystemWriterAsync):
    """Megatron-Core's storage writer with one file a rank.

    Args:
        folder: of the checkpoint.
        buffer: where the tensors are copied before they are written; None writes them as they are.

    Attributes:
        copied: set once the tensors may change.
    """

    def __init__(self, folder: Path, buffer: Buffer | None) -> None:
        super().__init__(str(folder), thread_count=1)
        self._buffer = buffer
        self._items: list[tuple[Any, Any]] = []
        self.name: str | None = None
        self.written = Written([])
        self.copied = threading.Event()
        self._ready: torch.cuda.Event | None = None

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Part of torch's protocol: take what the plan gives this rank."""
        self._items = [(item, planner.resolve_data(item)) for item in plan.items]
        if torch.cuda.is_available():
            self._ready = torch.cuda.current_stream().record_event()
        self.name = f"{plan.storage_data.prefix}0.distcp" if self._items else None

    def write(self) -> None:
        """Copy, write the file and make it durable; what goes wrong is kept in `written`."""
        if self.name is None:
            self.copied.set()
            return
        path = Path(self.checkpoint_dir) / self.name
        try:
            self._copy()
            # Each file has a checksum of its own, so that those of zip inside it would only cost time.
            without_crc = serialization.config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
            with without_crc, disk_errors(f"writing {path}"), HashedFile(path) as file:
                for number, (item, data) in enumerate(self._items):
                    if number == len(self._items) // 2:
                        failpoint("save.half_file")
                    data = _alone(data.cpu()) if isinstance(data, torch.Tensor) else data
                    self.written.results.append(
                        _write_item(self.transforms, file, data, item, self.name, SerializationFormat.TORCH_SAVE)
                    )
            self.written.fact = file.fact
        except EnvironmentFailure as error:
            self.written = Written([], failure=str(error))
        except Exception as error:
            self.written = Written([], failure=f"{path} could not be written: {type(error).__name__}: {error}.")
        finally:
            self._items = []
            self.copied.set()

    def _copy(self) -> None:
        tensors = [data.detach() for _, data in self._items if isinstance(data, torch.Tensor)]
        copies = iter(tensors if self._buffer is None else self._buffer.copy(tensors, self._ready))
        self._items = [(item, next(copies) if isinstance(data, torch.Tensor) else data) for item, data in self._items]
        if self._buffer is not None:
            self.copied.set()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that knows of no more than its own elements: torch.save writes all memory that a view is of."""
    own = torch.from_numpy(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return own.view(tensor.dtype).view(tensor.shape)


class Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy with `RankFile` as its writer; plans are made anew until two in a row are the same."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)
        self.cached_central_plan: Any
        self.cached_local_plan: Any
        self.validated_cache_reuse: bool
        self.buffer: Buffer | None = None
        self.file: RankFile | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        """Plan, and copy into the buffer if there is one; the request's function writes this rank's file."""
        grouped, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.file = RankFile(checkpoint_dir, self.buffer)
        found, self.cached_central_plan, self.cached_local_plan, self.validated_cache_reuse, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(grouped),
            self.file,
            None,
            0,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            cached_ckpt_structure=(self.cached_central_plan, self.cached_local_plan, self.validated_cache_reuse),
        )
        _, metadata, _ = found
        if metadata is not None:
            self.cached_global_metadata = metadata
        return AsyncRequest(self.file.write, (), [self._finalize])

    def _finalize(self) -> None:
        """Write the table of all tensors, unless a rank failed; then all ranks raise its sentence."""
        assert self.file is not None
        written = ranks.gather((self.file.written.results, self.file.written.failure))
        failure = next((why for _, why in written if why), "")
        if not failure and ranks.is_main():
            try:
                with disk_errors(f"writing {self.file.checkpoint_dir}"):
                    self.file.finish(self.cached_global_metadata, [results for results, _ in written])
            except EnvironmentFailure as error:
                failure = str(error)
        failure = ranks.broadcast(failure)
        if failure:
            raise EnvironmentFailure(failure)


class Background:
    """Runs a function in a thread, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
