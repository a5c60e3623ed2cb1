"""A tiny Qwen3-VL-MoE of transformers in the engine: its shape, its weights by the names of split files, packs with pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parallel import runs
from tests.upcycle.vl_parent import END, IMAGE, INNER, START

VISION = {"depth": 3, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 36}
LAYERS = 4
TABLE = ((np.arange(256) / 255 - 0.5) / 0.5).astype(np.float32)[None].repeat(3, 0)


def shape_of(config: Any) -> Any:
    """The engine's shape of a transformers config."""
    from moexpand.parallel.shape import ModelShape, VisionShape

    text, seen = config.text_config, config.vision_config
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts "
        "num_experts_per_tok moe_intermediate_size rms_norm_eps"
    )
    tower = (
        "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size "
        "out_hidden_size num_position_embeddings"
    )
    vision = VisionShape(
        **{name: getattr(seen, name) for name in tower.split()},
        image_token_id=config.image_token_id,
        deepstack_visual_indexes=tuple(seen.deepstack_visual_indexes),
    )
    return ModelShape(
        **{name: getattr(text, name) for name in names.split()},
        rope_theta=text.rope_parameters["rope_theta"],
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        prefix="model.language_model.",
        vision=vision,
    )


def split_name(name: str) -> tuple[str, int | None, slice]:
    """Where transformers' state keeps a tensor of a split file: its name, the expert, and the rows of the expert's part."""
    found = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return name, None, slice(None)
    rows = {"gate": slice(0, INNER), "up": slice(INNER, None), "down": slice(None)}[found[3]]
    return f"{found[1]}.{'down_proj' if found[3] == 'down' else 'gate_up_proj'}", int(found[2]), rows


def state_reader(state: dict[str, torch.Tensor]) -> Any:
    """Reads transformers' state, [E, 2I, H] and [E, H, I], by the names of split files."""

    def read(name: str, rows: slice | None) -> torch.Tensor:
        kept, expert, part = split_name(name)
        tensor = state[kept] if expert is None else state[kept][expert][part]
        return tensor if rows is None else tensor[rows]

    return read


class PicturedMicro(runs.Micro):
    """Segments of text and pictures: `parts` are numbers of text tokens or grids of patches (frames, rows, columns)."""

    def __init__(self, seed: int, segments: list[list[Any]], patch_bytes: int = 3 * 4 * 4, merge: int = 2) -> None:
        drawn = np.random.default_rng(seed)
        self.grids_of: list[list[tuple[int, int, int]]] = []
        made, masks, patches = [], [], []
        for parts in segments:
            tokens: list[int] = []
            grids = []
            for part in parts:
                if isinstance(part, int):
                    tokens += drawn.integers(0, 99, part).tolist()
                    continue
                count = int(np.prod(part))
                tokens += [START, *[IMAGE] * (count // merge**2), END]
                patches.append(drawn.integers(0, 256, (count, patch_bytes), dtype=np.uint8))
                grids.append(part)
            self.grids_of.append(grids)
            made.append(np.array(tokens))
            mask = (made[-1] != IMAGE).astype(np.float32)
            mask[-1] = 0
            masks.append(mask)
        super().__init__(made, masks)
        self.segments = made
        self.patches = np.concatenate(patches) if patches else None
        whole = [grid for grids in self.grids_of for grid in grids]
        self.grids = np.array(whole, dtype=np.int64) if whole else None


SEGMENTS: list[list[list[Any]]] = [
    [[3, (1, 4, 6), 8], [25], [(1, 2, 2), 4, (1, 6, 4), 5]],
    [[30], [34]],
    [[2, (1, 8, 8), 18], [(1, 2, 4), 5, (1, 2, 4), (1, 2, 6), 8]],
    [[(1, 6, 6), 4, (1, 6, 6), 5], [33]],
]
"""Four micro-batches of 64 tokens: several pictures of several sizes, none at all, two of one size, at a beginning."""


def micros() -> list[PicturedMicro]:
    """The micro-batches of a global batch."""
    made = [PicturedMicro(number, segments) for number, segments in enumerate(SEGMENTS)]
    for micro in made:
        lacking = 64 - len(micro.tokens)
        assert lacking == 0, f"lengthen the last text by {lacking}"
    return made


def batches(built: Any, given: list[Any]) -> list[Any]:
    """This data rank's micro-batches."""
    from moexpand.parallel.batch import PackedBatch

    own = given[built.ranks.data_rank :: built.ranks.data_size]
    return [PackedBatch.from_arrays(each, torch.device("cpu"), built.shape, TABLE) for each in own]


def saved_state(model: Any, place: Path) -> Path:
    """The model's state and config, for ranks to read."""
    torch.save({"state": model.state_dict(), "shape": shape_of(model.config)}, place)
    return place


def engine_of(place: Path, layout: dict[str, Any], rules: dict[str, Any] | None = None, precision: str = "fp32") -> Any:
    """A context with an engine of a saved state."""
    kept = torch.load(place, weights_only=False)
    return runs.built_engine(kept["shape"], state_reader(kept["state"]), layout, rules, precision)
