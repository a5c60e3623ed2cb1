"""A Hugging Face checkpoint folder, opened by its headers alone: config, tensors by name, side files."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, read_json
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.config_json import read_architecture
from moexpand.upcycle.families import family_of
from moexpand.upcycle.family import EXPERT, FUSED, SCALE, SPLIT, STACKS, Config, Family, stack_of, with_scales
from moexpand.upcycle.jobs import Read
from moexpand.upcycle.safetensors_file import CODES, Shape, TensorInfo, read_header
from moexpand.upcycle.tensors import BLOCK, scale_shape, stored_tensors, unit_shape

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPANSION = "expansion.json"
OWN_FILES = (CONFIG, INDEX, EXPANSION)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")

NUMPY: dict[str, Any] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "F32": "float32", "F64": "float64", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
"""numpy dtypes of header dtypes."""

SAMPLED = 1024
"""Bytes of each matrix in a fingerprint."""

FLOATS = ("F64", "F32", "BF16", "F16")
FP8 = "F8_E4M3"
SCALES = ("F32", "BF16", "F8_E8M0")


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder; nothing but headers and JSON has been read.

    Tensors lie in order of shard and offset in `tensors`; every one that the config calls for is there, with its shape.
    """

    folder: Path
    config: Config
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    """Files besides weights, index, config.json and expansion.json, relative to the folder."""

    @cached_property
    def architecture(self) -> Architecture:
        """Shape of the decoder, from config.json."""
        return read_architecture(self.config, str(self.folder / CONFIG))

    @property
    def family(self) -> Family:
        """Names and shapes of its kind."""
        return family_of(self.architecture.model_type)

    @cached_property
    def fingerprint(self) -> str:
        """What tells one parent from another without reading all of its matrices.

        SHA-256 over config.json, every tensor's name, dtype and shape, the bytes of all vectors and the first `SAMPLED` bytes of
        everything else: tuning that leaves the norms alone still changes matrices. A parent that differs only further inside a
        matrix is not told apart here; `verify` compares every byte.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            stop = info.stop if len(info.shape) == 1 else min(info.stop, info.start + SAMPLED)
            digest.update(read_range(info.file, info.start, stop))
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def experts_layout(self) -> str:
        """How the experts are stored, `SPLIT` or `FUSED`."""
        fused = (self.family.stack_name(layer, stack) for layer in self.architecture.moe_layers for stack in STACKS)
        return FUSED if any(name in self.tensors for name in fused) else SPLIT

    @cached_property
    def transposed(self) -> bool:
        """Whether its stacks are [E, in, out]: as on the hub for Qwen3-VL; transformers 5 saves the same model as [E, out, in].

        The stack of gate and up tells unless 2 I = H, and then that of down does.
        """
        if self.experts_layout != FUSED or not self.family.transposed:
            return False
        layer = self.architecture.moe_layers[0]
        for stack, matrices in STACKS.items():
            info = self.tensors.get(self.family.stack_name(layer, stack))
            shapes = [unit_shape(self.architecture, matrices, transposed) for transposed in (False, True)]
            if info is not None and shapes[0] != shapes[1]:
                return info.shape[1:] != shapes[0]
        return True

    def matrix_name(self, layer: int, expert: int, matrix: str) -> str:
        """The stored tensor that holds a matrix of an expert (a key of `EXPERT`, or its scales): its own, or the stack."""
        if self.experts_layout == FUSED:
            return self.family.stack_name(layer, stack_of(matrix))
        return self.family.expert_name(layer, expert, matrix)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """Stored dtype of the experts' matrices (keys of `EXPERT`, and scales of those that are FP8), the same in all layers."""
        layer = self.architecture.moe_layers[0]
        names = {matrix: self.matrix_name(layer, 0, matrix) for matrix in with_scales(EXPERT, lambda matrix: True)}
        return {matrix: self.tensors[name].dtype for matrix, name in names.items() if name in self.tensors}

    def quantised(self, name: str) -> bool:
        """Whether a tensor, or a matrix of the experts (a key of `EXPERT`), is stored as FP8 and so has scales."""
        if name in EXPERT:
            return self.dtypes.get(name) == FP8
        return name in self.tensors and self.tensors[name].dtype == FP8

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; an unknown name is an `InputError`."""
        if name not in self.tensors:
            raise InputError(f"{self.folder} has no tensor {name}.")
        return self.tensors[name]

    def read_bytes(self, name: str, rows: slice | None = None) -> bytearray:
        """Bytes of a tensor, or of a contiguous range of its first axis; only these bytes are read."""
        info = self.info(name)
        start, stop, _ = _byte_range(info, rows)
        return read_range(info.file, start, stop)

    def read_numpy(self, name: str, rows: slice | None = None, read: Read | None = None) -> np.ndarray:
        """A tensor, or rows of it, as numpy (ml_dtypes for bf16 and fp8); `read` brings its bytes, if not this function."""
        info = self.info(name)
        start, stop, shape = _byte_range(info, rows)
        return np.frombuffer((read or read_range)(info.file, start, stop), dtype=NUMPY[info.dtype]).reshape(shape)

    def read_torch(self, name: str, rows: slice | None = None) -> "torch.Tensor":
        """A tensor, or rows of it, as a CPU tensor of its own dtype that owns its memory."""
        import torch

        info = self.info(name)
        _, _, shape = _byte_range(info, rows)
        dtype = getattr(torch, {code: torch_name for torch_name, code in CODES.items()}[info.dtype])
        return (
            torch.frombuffer(self.read_bytes(name, rows), dtype=dtype).reshape(shape)
            if 0 not in shape
            else torch.empty(shape, dtype=dtype)
        )


def read_range(file: Path, start: int, stop: int) -> bytearray:
    """Bytes [start, stop) of a file; a file that ends early or cannot be read is an `EnvironmentFailure`."""
    buffer = bytearray(stop - start)
    with disk_errors(f"reading {file}"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            read_into(descriptor, memoryview(buffer), start, file)
        finally:
            os.close(descriptor)
    return buffer


def read_into(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    """Fill `view` with the bytes of an open file from `offset` on."""
    with disk_errors(f"reading {file}"):
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise EnvironmentFailure(f"{file} holds nothing at byte {offset:,} any more; it was cut since it was opened.")
            view, offset = view[count:], offset + count


def _byte_range(info: TensorInfo, rows: slice | None) -> tuple[int, int, tuple[int, ...]]:
    if rows is None:
        return info.start, info.stop, info.shape
    first, last, step = rows.indices(info.shape[0])
    if step != 1:
        raise InputError(f"Rows of {info.name} can only be read as one contiguous range, not with step {step}.")
    last = max(first, last)
    row = info.nbytes // info.shape[0] if info.shape[0] else 0
    return info.start + first * row, info.start + last * row, (last - first, *info.shape[1:])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder, single-file or sharded, and check that it is whole.

    Raises:
        InputError: a file is missing or damaged, index and shards disagree, or the tensors are not those that config.json
            calls for; the message names the file or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a Hugging Face checkpoint folder is needed.")
    config = read_json(folder / CONFIG)
    read_architecture(config, str(folder / CONFIG))  # a model of another kind is reported as such, not by its tensors
    tensors = _indexed(folder) if (folder / INDEX).is_file() else _single(folder)
    checkpoint = Checkpoint(folder, config, tensors, tuple(side_files_of(folder)))
    _check_tensors(checkpoint)
    return checkpoint


def _single(folder: Path) -> dict[str, TensorInfo]:
    if not (folder / SINGLE).is_file():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; a checkpoint in safetensors format is needed.")
    _refuse_strays(folder, {SINGLE})
    return read_header(folder / SINGLE)


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    index = read_json(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{folder / INDEX} has no weight_map from tensor names to files.")
    files = sorted(set(named.values()))
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX} names the file {file!r}, which is not a plain file name.")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing; {INDEX} names it.")
    _refuse_strays(folder, set(files))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if named.get(name) != file:
                place = f"puts it in {named[name]}" if name in named else "does not name it"
                raise InputError(f"{folder / file} holds {name}, but {INDEX} {place}.")
            tensors[name] = info
    for name, file in named.items():
        if name not in tensors:
            raise InputError(f"{folder / INDEX} puts {name} in {file}, which does not hold it.")
    return tensors


def _refuse_strays(folder: Path, used: set[str]) -> None:
    strays = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    if strays:
        raise InputError(f"{folder / strays[0]} belongs to no index; move it away or name its tensors in {INDEX}.")


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Everything that the config calls for is there in its shape, and nothing else is."""
    arch, family, where = checkpoint.architecture, checkpoint.family, str(checkpoint.folder / CONFIG)
    _check_stacks(checkpoint)
    carried = family.carried(checkpoint.config, where)
    expected = stored_tensors(arch, checkpoint.experts_layout, checkpoint.quantised, checkpoint.transposed) | carried
    expected |= {name + SCALE: scale_shape(shape) for name, shape in carried.items() if checkpoint.quantised(name)}
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise InputError(f"{checkpoint.folder} has no tensor {name}, which its config.json calls for.")
        _check_tensor(checkpoint, checkpoint.tensors[name], shape)
    allowed = family.buffers(checkpoint.config, where)
    for name, info in checkpoint.tensors.items():
        if name in allowed:
            _check_tensor(checkpoint, info, allowed[name])
        elif name.startswith(family.free):
            _check_scaled(checkpoint, info)
        elif name == family.head and name not in expected:
            raise InputError(
                f"{info.file} holds {name}, but {where} has tie_word_embeddings=true, by which the embedding is the head; set it "
                "to false to keep the stored head, or remove that tensor from its file to drop it."
            )
        elif name not in expected:
            raise InputError(f"{info.file} holds {name}, which is no tensor of a {arch.model_type} model.")
    _check_experts_alike(checkpoint)


def _check_stacks(checkpoint: Checkpoint) -> None:
    """Experts are all stacked or none, and no block of FP8 weights reaches from the gates of a stack into the ups."""
    if checkpoint.experts_layout != FUSED:
        return
    experts = {name: name.partition(".mlp.experts.")[2] for name in checkpoint.tensors if ".mlp.experts." in name}
    single = next((name for name, ending in experts.items() if ending[:1].isdigit()), None)
    if single is not None:
        stack = next(name for name, ending in experts.items() if not ending[:1].isdigit())
        raise InputError(
            f"{checkpoint.folder} holds experts stacked ({stack}) and others one by one ({single}); store all of them one way."
        )
    inner = checkpoint.architecture.moe_intermediate_size
    apart, together = 2 * scale_shape((inner,))[0], scale_shape((2 * inner,))[0]
    for layer in checkpoint.architecture.moe_layers:
        info = checkpoint.tensors.get(checkpoint.family.stack_name(layer, "gate_up_proj") + SCALE)
        if info is not None and len(info.shape) == 3 and info.shape[1 + checkpoint.transposed] == together < apart:
            raise InputError(
                f"{info.file}: {info.name} has scales of blocks that hold gates and ups at once, as experts of width {inner} are "
                f"no multiple of {BLOCK}; store the experts one by one, or unquantised."
            )


def _check_tensor(checkpoint: Checkpoint, info: TensorInfo, shape: Shape) -> None:
    if info.shape != shape:
        raise InputError(f"{info.file}: {info.name} has the shape {list(info.shape)}, but config.json calls for {list(shape)}.")
    if info.name.endswith(SCALE):
        if info.dtype not in SCALES:
            raise InputError(f"{info.file}: {info.name} is stored as {info.dtype}; scales may be {', '.join(SCALES)}.")
        return
    if info.dtype == FP8 and checkpoint.config.get("quantization_config"):
        _check_scaled(checkpoint, info)
    elif info.dtype not in FLOATS:
        raise InputError(
            f"{info.file}: {info.name} is stored as {info.dtype}; only F32, BF16, F16 and F64 weights are supported, and "
            f"{FP8} where config.json has a quantization_config."
        )


def _check_scaled(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """An FP8 tensor means nothing without its scales."""
    if info.dtype == FP8 and info.name + SCALE not in checkpoint.tensors:
        raise InputError(f"{info.file}: {info.name} is stored as {FP8}, but its scales {info.name}{SCALE} are missing.")


def _check_experts_alike(checkpoint: Checkpoint) -> None:
    """All experts are stored in one dtype; `stored_tensors` has asked the first one whether it has scales."""
    arch = checkpoint.architecture
    for layer in arch.moe_layers:
        for matrix, dtype in checkpoint.dtypes.items():
            for expert in range(arch.num_experts if checkpoint.experts_layout == SPLIT else 1):
                info = checkpoint.tensors[checkpoint.matrix_name(layer, expert, matrix)]
                if info.dtype != dtype:
                    raise InputError(
                        f"{info.file}: {info.name} is stored as {info.dtype}, but the first expert's as {dtype}; "
                        "convert the experts to one dtype."
                    )


def file_states(checkpoint: Checkpoint) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change, in nanoseconds, of every file that holds tensors."""
    files = {info.file for info in checkpoint.tensors.values()}
    with disk_errors(f"reading {checkpoint.folder}"):
        return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def side_files_of(folder: Path) -> list[Path]:
    """Files of a folder besides weights, index and configs, relative to it; hidden ones are left out."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in relative
        if not any(part.startswith(".") for part in path.parts)
        and path.suffix not in WEIGHT_SUFFIXES
        and str(path) not in OWN_FILES
    )


def side_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all side files."""
    return sum((checkpoint.folder / path).stat().st_size for path in checkpoint.side_files)
