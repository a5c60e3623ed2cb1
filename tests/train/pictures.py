"""Shards of captioned pictures and words of a `train` command for a tiny Qwen3-VL-MoE, for the tests of whole commands."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.commands import moexpand

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "grey": (128, 128, 128)}
IMAGE_PAD = 8204
"""<|image_pad|> of qwen-8192."""
TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 64,
    "deepstack_visual_indexes": "[0]", "image_token_id": IMAGE_PAD,
}  # fmt: skip
PIXELS = {"data.min_pixels": 256, "data.max_pixels": 1024}
"""With 8 x 8 pixels a token: pictures of 4 to 16 tokens."""


def picture_shards(folder: Path, count: int = 60) -> Path:
    """Pictures of one colour and several sizes, captioned with the colour, and some plain texts."""
    drawn = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    (folder / "texts").mkdir()
    names = list(COLOURS)
    for number in range(count):
        name = names[number % len(names)]
        height, width = drawn.integers(16, 40, 2)
        noise = drawn.integers(-25, 26, (height, width, 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03}.png")
        (folder / "pictures" / f"{number:03}.txt").write_text(f"The picture is {name}.")
    for number in range(8):
        words = drawn.choice(["expert", "router", "token", "balance", "gradient", "layer"], 120)
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    done = moexpand(
        "data", "build", f"sources=[{folder / 'pictures'},{folder / 'texts'}]", f"out={folder / 'shards'}", "tokenizer=qwen-8192",
        "workers=1", "filters.min_characters=1", "filters.image_distance=null", "filters.text_similarity=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def fresh_model(family: str = "qwen3_vl_moe", **changes: Any) -> dict[str, Any]:
    """Changes of `conftest.settings` for a fresh model with a tower."""
    tower = TOWER if family == "qwen3_vl_moe" else {key: value for key, value in TOWER.items() if "deepstack" not in key}
    return {"model.family": family, **{f"model.vision.{key}": value for key, value in tower.items()}, **PIXELS, **changes}
