"""A calibration folder: how a model routes, as exact counts of every layer and the router logits of a sample of tokens.

    calibration.json             what was run on what, sizes, SHA-256 of every other file
    layers/layer_000.json        usage [E], rank [K, E], coactivation [E, E], all counts of tokens
    router_logits/layer_000.npy  float32 [N, E], the same N tokens in every layer

Counted are the unmasked tokens: those that predict a token of their own segment; padding and ends of segments are not.

Legend: E experts, K experts a token visits, N tokens of the sample.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import disk_errors, new_folder, read_json, sha256, write_json

VERSION = 1
SUMMARY = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a calibration was made of."""

    checkpoint: str
    """Name of the model's folder."""
    parent: str
    """Fingerprint of the model."""
    shards: str
    """Fingerprint of the samples and their order on disk."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    seed: int
    """Of the order of samples and of the sample of tokens."""
    seq_length: int
    sequences: int
    """Packed sequences that were routed, each once."""
    tokens: int
    """Unmasked tokens in them: those that are counted."""
    sample: int
    """N, the counted tokens whose logits are kept, spread evenly over the run."""
    num_experts: int
    top_k: int
    num_groups: int
    precision: str
    versions: dict[str, str]
    """Of the programs that computed it."""


@dataclass(frozen=True)
class LayerCounts:
    """How one layer routed all counted tokens; int64."""

    usage: np.ndarray
    """[E], tokens that visit the expert."""
    rank: np.ndarray
    """[K, E], tokens whose k-th largest chosen logit is the expert's; row 0 counts the first choices."""
    coactivation: np.ndarray
    """[E, E], tokens that visit both experts; symmetric, zeros on the diagonal."""


@dataclass(frozen=True, kw_only=True)
class Calibration(Origin):
    """An opened folder; the logits stay on disk until they are used."""

    folder: Path
    digest: str
    """"sha256:..." over the content of all files."""
    layers: dict[int, LayerCounts]
    """By decoder layer; layers without a router have none."""

    def logits(self, layer: int) -> np.ndarray:
        """Router logits of the sampled tokens, float32 [N, E], as a map of the file."""
        if layer not in self.layers:
            raise InputError(f"{self.folder} holds no router logits of layer {layer}, which has no router.")
        return _map_logits(self.folder / logits_name(layer), (self.sample, self.num_experts))


def counts_name(layer: int) -> str:
    """Path of a layer's counts inside the folder."""
    return f"layers/layer_{layer:03d}.json"


def logits_name(layer: int) -> str:
    """Path of a layer's logits inside the folder."""
    return f"router_logits/layer_{layer:03d}.npy"


def write_calibration(folder: Path, origin: Origin, layers: Mapping[int, LayerCounts], logits: Mapping[int, np.ndarray]) -> None:
    """Write the folder, whole or not at all.

    Args:
        folder: must not exist.
        origin: what the counts and logits are of.
        layers: counts by decoder layer.
        logits: float32 [N, E] of the same layers.

    Raises:
        InputError: something stands under the folder's name.
        EnvironmentFailure: the disk is full, read-only, ...
    """
    with new_folder(Path(folder)) as building:
        files: dict[str, str] = {}
        for layer, counts in sorted(layers.items()):
            for name in (counts_name(layer), logits_name(layer)):
                (building / name).parent.mkdir(exist_ok=True)
            (building / counts_name(layer)).write_text(_row_per_line(counts), encoding="utf-8")
            np.save(building / logits_name(layer), np.ascontiguousarray(logits[layer], dtype=np.float32))
            files |= {name: f"sha256:{sha256(building / name)}" for name in (counts_name(layer), logits_name(layer))}
        write_json(building / SUMMARY, {"version": VERSION, **asdict(origin), "layers": sorted(layers), "files": files})


def read_calibration(folder: Path) -> Calibration:
    """Open a folder and check that it is whole and that its counts agree with each other.

    Raises:
        InputError: a file is missing or damaged; the sentence names it and says what is wrong.
        EnvironmentFailure: a file cannot be read.
    """
    folder = Path(folder)
    path = folder / SUMMARY
    if not path.is_file():
        raise InputError(f"{folder} is not a calibration folder: it has no {SUMMARY}; write one with `moexpand calibrate`.")
    with disk_errors(f"reading {folder}"):
        summary = read_json(path)
        origin, numbers, files = _checked_summary(summary, path)
        for name, digest in files.items():
            _check_digest(folder / name, digest)
        layers = {layer: _read_counts(folder / counts_name(layer), origin) for layer in numbers}
        for layer in numbers:
            _map_logits(folder / logits_name(layer), (origin.sample, origin.num_experts))
        # The summary holds the digests of all other files, so its own covers the folder.
        content = hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()
    return Calibration(folder=folder, digest=f"sha256:{content}", layers=layers, **asdict(origin))


def _row_per_line(counts: LayerCounts) -> str:
    """JSON with a line for each row of each matrix."""
    parts = [f' "usage": {_compact(counts.usage)}']
    for name in ("rank", "coactivation"):
        rows = ",\n".join(f"  {_compact(row)}" for row in getattr(counts, name))
        parts.append(f' "{name}": [\n{rows}\n ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(row: np.ndarray) -> str:
    return json.dumps(row.tolist(), separators=(",", ":"))


def _checked_summary(summary: Any, path: Path) -> tuple[Origin, list[int], dict[str, str]]:
    """Origin, layers and digests of a parsed calibration.json."""
    version = summary.get("version") if isinstance(summary, dict) else None
    if version != VERSION:
        raise InputError(f"{path} has the version {version}; this program reads version {VERSION}.")
    values = {field.name: summary.get(field.name) for field in fields(Origin)}
    for field in fields(Origin):
        if type(values[field.name]) is not (get_origin(field.type) or field.type):
            raise InputError(f"{path}: {field.name} is {values[field.name]!r}; the file is damaged.")
    layers, files = summary.get("layers"), summary.get("files")
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise InputError(f"{path}: layers is not a list of layers; the file is damaged.")
    expected = {name for layer in layers for name in (counts_name(layer), logits_name(layer))}
    if not isinstance(files, dict) or set(files) != expected:
        raise InputError(f"{path}: files does not name the counts and logits of its {len(layers)} layers; the file is damaged.")
    return Origin(**values), layers, files


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist, and {SUMMARY} names it; run `moexpand calibrate` again.")
    found = f"sha256:{sha256(path)}"
    if found != digest:
        raise InputError(
            f"{path} is damaged: its checksum is {found} and {SUMMARY} says {digest}; run `moexpand calibrate` again."
        )


def _read_counts(path: Path, origin: Origin) -> LayerCounts:
    value = read_json(path)
    experts, top_k = origin.num_experts, origin.top_k
    shapes = {"usage": (experts,), "rank": (top_k, experts), "coactivation": (experts, experts)}
    arrays = {name: _counts(value, name, shape, path) for name, shape in shapes.items()}
    usage, rank, pairs = arrays["usage"], arrays["rank"], arrays["coactivation"]
    faults = {
        f"a row of rank does not add up to the {origin.tokens:,} tokens": (rank.sum(1) != origin.tokens).any(),
        "usage is not the sum of the rows of rank": (usage != rank.sum(0)).any(),
        "coactivation is not symmetric": (pairs != pairs.T).any(),
        "coactivation is not zero on its diagonal": np.diagonal(pairs).any(),
        f"a row of coactivation is not {top_k - 1} times the expert's usage": (pairs.sum(1) != (top_k - 1) * usage).any(),
    }
    for fault, found in faults.items():
        if found:
            raise InputError(f"{path}: {fault}; the counts are damaged, run `moexpand calibrate` again.")
    return LayerCounts(**arrays)


def _counts(value: Any, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    try:
        found = np.array(value[name])
    except (KeyError, TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != shape or found.dtype != np.int64 or (found < 0).any():
        raise InputError(f"{path}: {name} is not {' x '.join(map(str, shape))} counts; run `moexpand calibrate` again.")
    return found


def _map_logits(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run `moexpand calibrate` again.") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not a .npy file: {error}.") from None
    if found.dtype != np.float32 or found.shape != shape:
        raise InputError(f"{path} holds {found.dtype} {list(found.shape)}; float32 {list(shape)} is needed.")
    return found
