"""Reads tensors of torch's distributed checkpoints straight into their places.

torch's own reader loads every stored piece whole, through Python's file objects, into new memory, and copies from there what was
asked for. Here a request that lies in one stretch of a stored piece is read from that stretch of the file into the tensor that
waits for it; a rank that holds a few of many experts reads these alone. What cannot be read so goes torch's way.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan
from torch.futures import Future


class Reader(CachedMetadataFileSystemReader):
    """torch's reader, for whole stretches without its detours."""

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Part of torch's protocol: fill what the plan asks for."""
        others, records = [], {}
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            start = self._stretch(item)
            if start is None:
                others.append(item)
                continue
            place = (stored.relative_path, stored.offset)
            if place not in records:
                records[place] = self.data_of(stored)
            beginning, size = records[place]
            target = planner.resolve_tensor(item).detach()
            if size != self._chunk(item).sizes.numel() * target.itemsize or target.dtype != self._stored_as(item):
                others.append(item)  # a view of more, or another format
                continue
            _read(Path(self.path) / stored.relative_path, beginning + start * target.itemsize, target)
            planner.commit_tensor(item, target)
        return super().read_data(LoadPlan(others, plan.storage_data, plan.planner_data), planner)

    def data_of(self, stored: Any) -> tuple[int, int]:
        """Where the numbers of a tensor lie that torch.save wrote into a file, and their bytes."""
        with open(Path(self.path) / stored.relative_path, "rb") as file:
            archive: Any = torch._C.PyTorchFileReader(self._slice_file(file, stored))
            return stored.offset + archive.get_record_offset("data/0"), archive.get_record_size("data/0")

    def _table(self, item: Any) -> TensorStorageMetadata:
        table = self.read_metadata().state_dict_metadata[item.storage_index.fqn]
        assert isinstance(table, TensorStorageMetadata)
        return table

    def _chunk(self, item: Any) -> Any:
        """Offsets and sizes of the stored piece that a request is about."""
        chunks, hint = self._table(item).chunks, item.storage_index.index
        if hint is not None and hint < len(chunks) and chunks[hint].offsets == item.storage_index.offset:
            return chunks[hint]
        return next(chunk for chunk in chunks if chunk.offsets == item.storage_index.offset)

    def _stored_as(self, item: Any) -> torch.dtype:
        return self._table(item).properties.dtype

    def _stretch(self, item: Any) -> int | None:
        """Element of the stored piece at which a request begins, where it is one stretch of it; None where it is not."""
        if item.type == LoadItemType.BYTE_IO:
            return None
        sizes, lengths = tuple(self._chunk(item).sizes), tuple(item.lengths)
        single = next((axis for axis, length in enumerate(lengths) if length != 1), len(lengths))
        if lengths[single + 1 :] != sizes[single + 1 :]:
            return None
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        return sum(offset * stride for offset, stride in zip(item.storage_offsets, strides, strict=True))


class LoadStrategy(TorchDistLoadShardedStrategy):
    """Megatron-Core's strategy with `Reader`; for tensors whose shapes in the model are those in the checkpoint."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        """Part of Megatron-Core's protocol: load into the tensors of the state."""
        original = sharded_state_dict
        grouped, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [each for each in nested_values(original) if isinstance(each, ShardedTensor)]
        state = mcore_to_pyt_state_dict(grouped, True)
        reader = Reader(checkpoint_dir)
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[each for each in tensors if not each.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={each.key: each for each in tensors if each.allow_shape_mismatch},
        )
        torch_checkpoint.load(state, storage_reader=reader, planner=planner)
        self.cached_global_metadata = reader.read_metadata()
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
        _restore_dict_types(loaded, original)
        return loaded


def _read(path: Path, position: int, target: torch.Tensor) -> None:
    """Fill a tensor from a file."""
    direct = target.is_contiguous() and target.device.type == "cpu"
    place = target if direct else torch.empty(target.shape, dtype=target.dtype, pin_memory=target.is_cuda)
    view = memoryview(place.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], position + done)
            if not count:
                raise OSError(f"{path} ends before byte {position + len(view)}")
            done += count
    if not direct:
        target.copy_(place)
