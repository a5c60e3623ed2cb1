"""A calibration folder comes back as it was written, and one that is damaged is refused by the name of the file at fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moexpand.base.errors import InputError
from moexpand.base.files import sha256
from moexpand.upcycle.calibration import LayerCounts, Origin, read_calibration, write_calibration

TOKENS, SAMPLE, EXPERTS, TOP_K, LAYERS = 50, 12, 6, 3, (1, 3)
ORIGIN = Origin(
    checkpoint="parent",
    parent="sha256:0",
    shards="1",
    tokenizer="2",
    seed=7,
    seq_length=32,
    sequences=2,
    tokens=TOKENS,
    sample=SAMPLE,
    num_experts=EXPERTS,
    top_k=TOP_K,
    num_groups=1,
    precision="fp32",
    versions={"moexpand": "0"},
)


def routed(layer: int) -> tuple[LayerCounts, np.ndarray]:
    """Counts of random logits, one token after the other, and the first logits."""
    logits = np.random.default_rng(layer).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    usage, rank, pairs = np.zeros(EXPERTS, int), np.zeros((TOP_K, EXPERTS), int), np.zeros((EXPERTS, EXPERTS), int)
    for row in logits:
        chosen = np.argsort(-row)[:TOP_K]
        for k, expert in enumerate(chosen):
            usage[expert] += 1
            rank[k, expert] += 1
            for other in chosen:
                pairs[expert, other] += other != expert
    return LayerCounts(usage, rank, pairs), logits[:SAMPLE]


def write(folder: Path) -> Path:
    found = {layer: routed(layer) for layer in LAYERS}
    write_calibration(
        folder,
        ORIGIN,
        {layer: counts for layer, (counts, _) in found.items()},
        {layer: logits for layer, (_, logits) in found.items()},
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "calibration")


def test_what_was_written_comes_back(folder: Path) -> None:
    found = read_calibration(folder)
    assert (found.folder, found.parent, found.tokens, found.top_k, found.num_experts) == (
        folder,
        "sha256:0",
        TOKENS,
        TOP_K,
        EXPERTS,
    )
    assert list(found.layers) == list(LAYERS)
    for layer in LAYERS:
        counts, logits = routed(layer)
        for name in ("usage", "rank", "coactivation"):
            read = getattr(found.layers[layer], name)
            assert read.dtype == np.int64
            assert np.array_equal(read, getattr(counts, name)), name
        assert np.array_equal(found.logits(layer), logits)
        assert isinstance(found.logits(layer), np.memmap)
    with pytest.raises(InputError, match="layer 0"):
        found.logits(0)


def test_counts_are_json_with_a_line_a_row(folder: Path) -> None:
    text = (folder / "layers" / "layer_001.json").read_text()
    assert json.loads(text)["coactivation"] == routed(1)[0].coactivation.tolist()
    assert len(text.splitlines()) == 2 + 1 + (TOP_K + 2) + (EXPERTS + 2)


def test_digest_follows_the_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    assert read_calibration(again).digest == read_calibration(folder).digest
    assert read_calibration(folder).digest.startswith("sha256:")
    other = {layer: np.zeros((SAMPLE, EXPERTS), np.float32) for layer in LAYERS}
    write_calibration(tmp_path / "other", ORIGIN, {layer: routed(layer)[0] for layer in LAYERS}, other)
    assert read_calibration(tmp_path / "other").digest != read_calibration(folder).digest


def test_a_folder_that_exists_is_left_alone(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="exists already"):
        write(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    counts = {layer: routed(layer)[0] for layer in LAYERS}
    with pytest.raises(KeyError):
        write_calibration(tmp_path / "calibration", ORIGIN, counts, {1: routed(1)[1]})
    assert not list(tmp_path.iterdir())


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file and give it the checksum that belongs to it, as a careless tool would."""
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    if name != "calibration.json":
        digests = {name: f"sha256:{sha256(path)}"}
        edit(folder, "calibration.json", lambda value: value | {"files": value["files"] | digests})


def save(folder: Path, content: Any) -> None:
    path = folder / "router_logits" / "layer_003.npy"
    np.save(path, content, allow_pickle=True)
    digests = {"router_logits/layer_003.npy": f"sha256:{sha256(path)}"}
    edit(folder, "calibration.json", lambda value: value | {"files": value["files"] | digests})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def moved(value: Any) -> Any:
    """One first choice moved to another expert, usage with it, so that only coactivation tells."""
    giver = next(expert for expert in range(EXPERTS) if value["rank"][0][expert])
    for row in (value["rank"][0], value["usage"]):
        row[giver] -= 1
        row[(giver + 1) % EXPERTS] += 1
    return value


def added(name: str, *place: int) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        row = value[name]
        for index in place[:-1]:
            row = row[index]
        row[place[-1]] += 1
        return value

    return change


COUNTS, LOGITS, SUMMARY = "layers/layer_003.json", "router_logits/layer_003.npy", "calibration.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "calibration", "has no calibration.json"),
    "no summary": (lambda folder: (folder / SUMMARY).unlink(), "calibration", "has no calibration.json"),
    "half a summary": (lambda folder: (folder / SUMMARY).write_text('{"version": 1'), SUMMARY, "not valid JSON"),
    "a list": (lambda folder: (folder / SUMMARY).write_text("[]"), SUMMARY, "version None"),
    "another version": (lambda folder: edit(folder, SUMMARY, lambda value: value | {"version": 2}), SUMMARY, "version 2"),
    "a number as text": (lambda folder: edit(folder, SUMMARY, lambda value: value | {"tokens": "50"}), SUMMARY, "tokens is '50'"),
    "a field less": (
        lambda folder: edit(folder, SUMMARY, lambda value: {k: v for k, v in value.items() if k != "top_k"}),
        SUMMARY,
        "top_k is None",
    ),
    "a layer less": (lambda folder: edit(folder, SUMMARY, lambda value: value | {"layers": [1]}), SUMMARY, "its 1 layers"),
    "no counts": (lambda folder: (folder / COUNTS).unlink(), COUNTS, "does not exist"),
    "no logits": (lambda folder: (folder / LOGITS).unlink(), LOGITS, "does not exist"),
    "a flipped bit of the counts": (lambda folder: flip(folder / COUNTS), COUNTS, "checksum"),
    "a flipped bit of the logits": (lambda folder: flip(folder / LOGITS), LOGITS, "checksum"),
    "a token lost": (lambda folder: edit(folder, COUNTS, added("rank", 1, 0)), COUNTS, "add up to the 50 tokens"),
    "usage of its own": (lambda folder: edit(folder, COUNTS, added("usage", 2)), COUNTS, "usage is not the sum"),
    "one-sided pairs": (lambda folder: edit(folder, COUNTS, added("coactivation", 0, 1)), COUNTS, "not symmetric"),
    "pairs with itself": (lambda folder: edit(folder, COUNTS, added("coactivation", 1, 1)), COUNTS, "diagonal"),
    "pairs of another run": (lambda folder: edit(folder, COUNTS, moved), COUNTS, "2 times the expert's usage"),
    "fractions": (
        lambda folder: edit(folder, COUNTS, lambda value: value | {"usage": [0.5] * EXPERTS}),
        COUNTS,
        "usage is not 6",
    ),
    "ragged rows": (
        lambda folder: edit(folder, COUNTS, lambda value: value | {"rank": [[1], [2, 3]]}),
        COUNTS,
        "rank is not 3 x 6",
    ),
    "float64 logits": (lambda folder: save(folder, np.zeros((SAMPLE, EXPERTS))), LOGITS, "float64"),
    "fewer logits": (lambda folder: save(folder, np.zeros((1, EXPERTS), np.float32)), LOGITS, "[1, 6]"),
    "pickled logits": (lambda folder: save(folder, np.array([{}], dtype=object)), LOGITS, "not a .npy file"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(folder: Path, name: str) -> None:
    damage, file, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(InputError) as caught:
        read_calibration(folder)
    sentence = str(caught.value)
    assert file in sentence
    assert words in sentence
    assert "\n" not in sentence
