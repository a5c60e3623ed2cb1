"""Shards hold whole bundles, as many as fit, and a recipe that does not fill them is found out."""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.upcycle.jobs import Bundle, Job, Made, Place
from moexpand.upcycle.layout import plan_layout
from moexpand.upcycle.reading import PIECE
from moexpand.upcycle.recipe import Recipe
from moexpand.upcycle.safetensors_file import read_header
from moexpand.upcycle.writer import expand
from tests.upcycle.expanding import recipe_of, write_parent

bundle_sizes = st.lists(st.lists(st.sampled_from([1, 100, 4096, 5000, 8192]), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(bundle_sizes, st.sampled_from([1, 5000, 10_000, 100_000]))
def test_bundles_stay_whole_and_shards_below_the_limit(sizes: list[list[int]], limit: int) -> None:
    tensors = {f"t{b}.{t}": ("U8", (size,)) for b, bundle in enumerate(sizes) for t, size in enumerate(bundle)}
    bundles = [Bundle(tuple(f"t{b}.{t}" for t in range(len(bundle))), ()) for b, bundle in enumerate(sizes)]
    layout = plan_layout(tensors, bundles, limit)
    assert list(layout.tensors) == list(tensors)
    for bundle in bundles:
        assert len({layout.tensors[name].file for name in bundle.tensors}) == 1
    held: dict[str, list[int]] = {file: [] for file in layout.sizes}
    for b, bundle in enumerate(sizes):
        held[str(layout.tensors[f"t{b}.0"].file)].append(sum(bundle))
    files = list(held.values())
    assert all(sum(file) <= limit or len(file) == 1 for file in files)
    assert all(sum(file) + following[0] > limit for file, following in pairwise(files))  # none too many
    for file, names in layout.shards.items():
        end = len(layout.header(file))
        assert end % 4096 == 0
        for name in names:
            info = layout.tensors[name]
            assert info.start == end
            assert info.nbytes % 4096 or info.start % 4096 == 0  # whole blocks lie on blocks
            end = info.stop
        assert end == layout.sizes[file]


def test_the_header_is_one_that_a_strict_reader_takes(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", (3, 5)), "b": ("F32", (1024, 2)), "c": ("U8", (0,))}
    layout = plan_layout(tensors, [Bundle(tuple(tensors), ())])
    (file,) = layout.sizes
    (tmp_path / file).write_bytes(layout.header(file).ljust(layout.sizes[file], b"\0"))
    found = read_header(tmp_path / file)
    assert {name: (info.dtype, info.shape, info.start, info.stop) for name, info in found.items()} == {
        name: (info.dtype, info.shape, info.start, info.stop) for name, info in layout.tensors.items()
    }


def test_digests_tell_layouts_apart() -> None:
    tensors = {"a": ("U8", (10,)), "b": ("U8", (10,))}
    apart, together = ([Bundle(("a",), ()), Bundle(("b",), ())], [Bundle(("a", "b"), ())])
    assert plan_layout(tensors, apart, 100).digest == plan_layout(tensors, together, 100).digest
    assert plan_layout(tensors, apart, 10).digest != plan_layout(tensors, together, 10).digest


def test_stacked_experts_have_a_checksum_over_their_pieces(tmp_path: Path) -> None:
    """As expansion.json documents it: SHA-256 of the raw SHA-256 digests of so many pieces of equal size."""
    expand(recipe_of(write_parent(tmp_path / "parent"), experts_layout="fused"), tmp_path / "child", max_shard_size="1MB")
    record = json.loads((tmp_path / "child" / "expansion.json").read_text())
    stacked = [name for name in record["checksums"] if name.endswith(("gate_up_proj", "down_proj"))]
    assert sorted(record["checksum_pieces"]) == sorted(stacked)
    assert len(stacked) == 8
    for file in (tmp_path / "child").glob("*.safetensors"):
        for name, info in read_header(file).items():
            data = file.read_bytes()[info.start : info.stop]
            count = record["checksum_pieces"].get(name, 1)
            step = len(data) // count
            pieces = [hashlib.sha256(data[at : at + step]).digest() for at in range(0, len(data), step)]
            assert len(pieces) == count
            due = pieces[0] if count == 1 else hashlib.sha256(b"".join(pieces)).digest()
            assert record["checksums"][name] == due.hex()


def altered(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> Recipe:
    """A recipe whose embedding is made by `change`: content and offset of its only job."""
    real = Recipe.bundles

    def bundles(self: Recipe) -> Iterator[Bundle]:
        for bundle in real(self):
            if bundle.tensors == ("model.embed_tokens.weight",):
                ((job,),) = bundle.tasks
                place = Place(job.places[0].tensor, int(str(change.get("offset", 0))))
                content = change.get("content", job.content)
                bundle = Bundle(bundle.tensors, ((Job(content, (place,), job.origin),),))  # type: ignore[arg-type]
            yield bundle

    monkeypatch.setattr(Recipe, "bundles", bundles)
    return recipe


def test_a_recipe_that_leaves_a_hole_is_an_error_and_not_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(write_parent(tmp_path / "parent"))
    size = 2 * 130 * 128
    half = Made(size // 2, lambda read: iter([memoryview(bytes(size // 2))]))
    with pytest.raises(RuntimeError, match=r"does not fill model\.embed_tokens\.weight"):
        expand(altered(recipe, monkeypatch, {"content": half}), tmp_path / "child")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_content_of_another_size_than_told_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(write_parent(tmp_path / "parent"))
    short = Made(2 * 130 * 128, lambda read: iter([memoryview(bytes(100))]))
    with pytest.raises(RuntimeError, match="came with 100 bytes instead of 33,280"):
        expand(altered(recipe, monkeypatch, {"content": short}), tmp_path / "child")


def test_computed_pieces_of_any_size_arrive_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are larger than a worker's buffer, and such that straddle its end."""
    width = 1 + 2 * PIECE // (2 * 130)
    recipe = recipe_of(write_parent(tmp_path / "parent", layers=1))
    name, size = "model.embed_tokens.weight", 2 * 130 * width
    content = np.random.default_rng(0).integers(0, 256, size=size, dtype=np.uint8).tobytes()
    edges = [0, 5, PIECE - 1, size - 7, size]
    made = Made(size, lambda read: (memoryview(content)[a:b] for a, b in pairwise(edges)))
    recipe.tensors[name] = ("BF16", (130, width))
    expand(altered(recipe, monkeypatch, {"content": made}), tmp_path / "child")
    (file,) = (tmp_path / "child").glob("*.safetensors")
    info = read_header(file)[name]
    assert file.read_bytes()[info.start : info.stop] == content
