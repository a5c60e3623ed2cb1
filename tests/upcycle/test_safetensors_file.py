"""Headers are read strictly, and files laid out from shapes are ordinary safetensors files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from moexpand.base.errors import InputError
from moexpand.upcycle.safetensors_file import ALIGNMENT, build_header, read_header


def _file(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_places_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.int64),
        "c": np.zeros((0, 4), np.float16),
    }
    save_file(arrays, tmp_path / "f.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "f.safetensors")
    raw = (tmp_path / "f.safetensors").read_bytes()
    assert set(infos) == set(arrays)
    for name, array in arrays.items():
        assert infos[name].shape == array.shape
        assert raw[infos[name].start : infos[name].stop] == array.tobytes()


def test_a_laid_out_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "y": np.arange(3, dtype=np.float16)}
    header, ranges = build_header({"x": ("F32", (2, 4)), "y": ("F16", (3,))})
    assert len(header) % ALIGNMENT == 0
    (tmp_path / "f.safetensors").write_bytes(header + arrays["x"].tobytes() + arrays["y"].tobytes())
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    assert {name: (info.start, info.stop) for name, info in read_header(tmp_path / "f.safetensors").items()} == ranges


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, "b overlaps"),
        ({"a": _entry(0, 8), "b": _entry(12, 20)}, "b is|b ends|truncated"),
        ({"a": _entry(0, 4, (1,)), "b": _entry(8, 16)}, "b leaves a hole"),
        ({"a": _entry(0, 8), "b": _entry(8, 24, (4,))}, "truncated.* b ends"),
        ({"a": _entry(0, 8)}, "8 bytes after its last tensor"),
        ({"a": _entry(0, 12)}, "a has 12 bytes, but F32"),
        ({"a": _entry(8, 0)}, "a has -8 bytes"),
        ({"a": _entry(0, 8, dtype="F99")}, "entry of a"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry of a"),
        ({"a": _entry(0, 8, (-1, -2))}, "entry of a"),
        ({"a": 3}, "entry of a"),
        (
            b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            "'a' twice",
        ),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe\x00garbage", "not JSON"),
    ],
)
def test_a_lying_header_is_refused_by_file_and_tensor(tmp_path: Path, header: Any, says: str) -> None:
    file = _file(tmp_path / "lying.safetensors", header)
    with pytest.raises(InputError, match=says) as error:
        read_header(file)
    assert "lying.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\1\2\3", (10**12).to_bytes(8, "little") + b"{}", (50).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stub.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"stub\.safetensors"):
        read_header(tmp_path / "stub.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        read_header(tmp_path / "absent.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_no_damaged_byte_of_a_header_leads_to_anything_but_a_sentence(tmp_path: Path, position: int, value: int) -> None:
    header, _ = build_header({"weight": ("F32", (2, 3)), "bias": ("BF16", (3,))})
    content = bytearray(header + bytes(30))
    content[position] = value
    (tmp_path / "f.safetensors").write_bytes(content)
    try:
        infos = read_header(tmp_path / "f.safetensors")
    except InputError as error:
        assert "f.safetensors" in str(error)
    else:
        assert all(0 < info.start <= info.stop <= len(content) for info in infos.values())
