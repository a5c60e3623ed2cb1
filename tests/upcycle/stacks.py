"""Experts in files, one tensor each or stacked, and tensors compared bit for bit: by torch and the safetensors library alone.

Legend: E experts, H hidden, I inner width of an expert.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight(.*)")
STACK = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(.*)")


def stored(tensors: Tensors, transposed: bool) -> Tensors:
    """Experts as fused files hold them: [E, gate above up, H] and [E, H, I], or with the last two axes exchanged."""
    files = {name: value for name, value in tensors.items() if not EXPERT.fullmatch(name)}
    units: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, value in tensors.items():
        if found := EXPERT.fullmatch(name):
            stack = "down_proj" if found[3] == "down_proj" else "gate_up_proj"
            units.setdefault(f"{found[1]}.{stack}{found[4]}", {}).setdefault(int(found[2]), []).append(value)
    for name, parts in units.items():
        whole = torch.stack([torch.cat([bits(part) for part in parts[expert]]) for expert in range(len(parts))])
        files[name] = (whole.transpose(1, 2) if transposed else whole).contiguous().view(next(iter(parts.values()))[0].dtype)
    return files


def apart(files: Tensors, transposed: bool) -> Tensors:
    """One tensor an expert and matrix, whatever the files hold."""
    tensors = {name: value for name, value in files.items() if not STACK.fullmatch(name)}
    for name, value in files.items():
        if found := STACK.fullmatch(name):
            halves = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
            for expert, matrix in enumerate(value.transpose(1, 2) if transposed else value):
                for half, part in zip(halves, matrix.chunk(len(halves)), strict=True):
                    tensors[f"{found[1]}.{expert}.{half}.weight{found[3]}"] = part.contiguous()
    return tensors


def bits(value: torch.Tensor) -> torch.Tensor:
    """The same tensor as integers, which compare bit for bit and can be joined whatever the dtype."""
    return value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def read(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same names, and under every name the same dtype, shape and bits."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(bits(value), bits(expected[name])), name
