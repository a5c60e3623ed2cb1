"""Pictures as Qwen3-VL and Intern-S1-Pro take them: resized to whole patches, normalised, cut into patches, counted in tokens.

N patches, C = 3 channels, T = temporal_patch_size, P = patch_size, M = merge_size. Patches stand in blocks of M x M, which the
model merges into one token. They travel as the bytes of the resized picture, [C, P, P] each, an eighth of what models take:
float32 [C, T, P, P], the one frame repeated T times, which `normalise`, or `table` on a device, makes of them. Bits are those of
transformers' `Qwen2VLImageProcessorPil`: the same Pillow resampling, and a table of its results for all 256 values.

A picture's tokens follow from its height and width alone, so they are planned without reading it.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.data.image_decode import BadImage, to_rgb

MAX_ASPECT = 200
"""Longer side over shorter side; beyond it the model's own processor refuses."""
MAX_SIDE = (1 << 26) - 1
"""Of a picture to plan for: products of sides stay exact in float64."""
CHANNELS = 3
BLOCK = 64
"""Patches that are looked up at a time, so that what lies between stays in cache."""
BICUBIC = 3
"""The number of this filter in Pillow and in preprocessor_config.json."""

_REQUIRED = ("patch_size", "image_mean", "image_std")
_NUMBERS = ("patch_size", "merge_size", "temporal_patch_size", "rescale_factor", "min_pixels", "max_pixels")
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_WITHOUT_EFFECT = frozenset({
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "data_format", "input_data_format", "device",
    "disable_grouping", "return_tensors", "crop_size", "pad_size", "default_to_square", "transformers_version",
})  # fmt: skip
"""Fields that transformers writes and that its Qwen2-VL processor does not use on pictures, or that say where and how it runs."""


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become patches; the defaults are Qwen3-VL's."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    merge_size: int = 2
    """A block of merge_size x merge_size patches is one token."""
    temporal_patch_size: int = 2
    """Frames of a patch; a picture repeats its one frame."""
    min_pixels: int = 65_536
    """Smallest area after resizing, in pixels (`size.shortest_edge` in transformers 5)."""
    max_pixels: int = 16_777_216
    """Largest area after resizing, in pixels (`size.longest_edge` in transformers 5)."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted by channel, after rescaling."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divisor by channel."""
    rescale_factor: float = 1 / 255
    """Takes 0 ... 255 to what mean and std are in."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of the image settings is {value!r}; it must be a whole number of at least 1.")
        if self.patch_size % 2:
            raise InputError(f"patch_size of the image settings is {self.patch_size}; it must be even.")
        if self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels of the image settings is {self.min_pixels}, above max_pixels, {self.max_pixels}.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != CHANNELS or not all(map(_is_finite, values)):
                raise InputError(f"{name} of the image settings is {values!r}; it must be three finite numbers.")
        if min(self.image_std) <= 0 or not _is_finite(self.rescale_factor) or self.rescale_factor <= 0:
            raise InputError("image_std and rescale_factor of the image settings must be positive numbers.")

    @property
    def factor(self) -> int:
        """Sides after resizing are multiples of this: the side of a token in pixels."""
        return self.patch_size * self.merge_size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all settings: equal where every picture gives the same number of tokens and the same patches."""
        settings = asdict(self) | {"format": 1, "processor": "qwen2_vl", "resample": "bicubic"}
        settings |= {name: [float(value) for value in settings[name]] for name in ("image_mean", "image_std")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "ImageSettings":
        """From a checkpoint's `processor_config.json` (its part `image_processor`, which goes first as in transformers) or
        `preprocessor_config.json`.

        Raises:
            InputError: neither file, no valid JSON, a field that is not known, or one that asks for what is not done here.
        """
        for name in ("processor_config.json", "preprocessor_config.json"):
            path = Path(folder) / name
            if not path.is_file():
                continue
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path} is not valid JSON: {error}.") from error
            if name == "processor_config.json":
                fields = fields.get("image_processor") if isinstance(fields, dict) else None
                if fields is None:
                    continue
            if not isinstance(fields, dict):
                raise InputError(f"{path} holds no JSON object with image settings.")
            return cls._from_fields(fields, str(path))
        raise InputError(f"{folder} has neither preprocessor_config.json nor a processor_config.json with an image_processor.")

    def to_fields(self) -> dict[str, Any]:
        """preprocessor_config.json with these settings, as transformers reads it."""
        return {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **dict.fromkeys(_STEPS, True),
            "resample": BICUBIC,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **{name: getattr(self, name) for name in ("patch_size", "merge_size", "temporal_patch_size", "rescale_factor")},
            **{name: list(getattr(self, name)) for name in ("image_mean", "image_std")},
        }

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], where: str) -> "ImageSettings":
        given = {name: value for name, value in fields.items() if value is not None}
        kind = given.get("image_processor_type", "Qwen2VLImageProcessor")
        if str(kind).removesuffix("Fast").removesuffix("Pil") != "Qwen2VLImageProcessor":
            raise InputError(f"{where} asks for {kind}; Qwen2VLImageProcessor, which Qwen3-VL uses, is what is known here.")
        size = given.pop("size", {})
        if not isinstance(size, dict) or set(size) - {"shortest_edge", "longest_edge"}:
            raise InputError(f"{where} gives size {size!r}; shortest_edge and longest_edge, both areas, are what is known here.")
        for pixels, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            given.setdefault(pixels, size.get(edge))
            if given[pixels] is None:
                raise InputError(f"{where} gives neither size.{edge} nor {pixels}; add the area in pixels.")
        for name, known in (
            dict.fromkeys(_STEPS, True) | {"do_center_crop": False, "do_pad": False, "resample": BICUBIC}
        ).items():
            if (value := given.pop(name, known)) != known:
                raise InputError(f"{where} sets {name} to {value!r}; only {known!r} is known here.")
        settings = {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT}
        if unknown := sorted(set(settings) - set(_NUMBERS) - set(_REQUIRED)):
            raise InputError(
                f"{where} has the field {unknown[0]}, whose effect on pictures is not known here; remove it if it has none."
            )
        for name in _REQUIRED:
            if name not in settings:
                raise InputError(f"{where} does not give {name}; add it.")
        for name in ("image_mean", "image_std"):
            values = settings[name] if isinstance(settings[name], list) else [settings[name]] * CHANNELS
            settings[name] = tuple(values)
        return cls(**settings)

    def smart_resize(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of `factor`, area within the limits, aspect kept as far as that allows.

        Raises:
            BadImage: `aspect`, one side is more than 200 times the other; `broken` or `too_many_pixels`, a side is below 1
                or above 2^26 - 1.
        """
        if min(height, width) < 1:
            raise BadImage("broken", f"The picture has {height} x {width} pixels.")
        if max(height, width) > MAX_SIDE:
            raise BadImage("too_many_pixels", f"The picture has {height} x {width} pixels; a side may have {MAX_SIDE}.")
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise BadImage("aspect", f"The picture has {height} x {width} pixels; one side may be {MAX_ASPECT} times the other.")
        factor = self.factor
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height = math.ceil(height * grow / factor) * factor
            new_width = math.ceil(width * grow / factor) * factor
        return new_height, new_width

    def vision_tokens(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Tokens of many pictures: what `smart_resize` gives, divided by factor^2, for planning.

        Args:
            heights, widths: whole numbers, of one shape [N] or shapes that broadcast; upright, as `image_size` gives them.

        Returns:
            int64 [N]; 0 for a picture that `smart_resize` refuses.
        """
        heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
        # Sides as multiples of the factor, rounded half to even as Python does; float64 makes the same roundings as the scalar.
        long, short = np.maximum(heights, widths), np.minimum(heights, widths)
        usable = (short >= 1) & (long <= MAX_SIDE)
        usable &= long / np.where(usable, short, 1) <= MAX_ASPECT
        height, width = (np.where(usable, sides, 1).astype(np.float64) for sides in (heights, widths))
        factor = float(self.factor)
        rows, columns = np.rint(height / factor), np.rint(width / factor)
        area = rows * columns * factor**2
        shrink = np.sqrt(height * width / self.max_pixels)
        grow = np.sqrt(self.min_pixels / (height * width))
        large, small = area > self.max_pixels, area < self.min_pixels
        rows = np.where(large, np.maximum(1, np.floor(height / shrink / factor)), rows)
        columns = np.where(large, np.maximum(1, np.floor(width / shrink / factor)), columns)
        rows = np.where(small, np.ceil(height * grow / factor), rows)
        columns = np.where(small, np.ceil(width * grow / factor), columns)
        return np.where(usable, rows * columns, 0).astype(np.int64)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class ImageProcessor:
    """Turns pictures into patches by fixed settings."""

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings

    @cached_property
    def table(self) -> np.ndarray:
        """float32 [C, 256]: what each value of each channel becomes, with the roundings of transformers, step by step."""
        values = (np.arange(256, dtype=np.float64) * self.settings.rescale_factor).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.settings.image_mean, self.settings.image_std))
        return (values - mean) / std

    @cached_property
    def _pairs(self) -> np.ndarray:
        """uint64 [C, 65536]: the table for two neighbouring pixels at once, half as many look-ups."""
        neighbours = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
        return np.stack([row[neighbours].view(np.uint64)[:, 0] for row in self.table])

    def process(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches and grid of one picture.

        Args:
            image: upright; any mode, converted as `to_rgb` does.

        Returns:
            Patches, uint8 [N, C * P * P], and the grid (1, patches in a column, patches in a row), whose product is N.

        Raises:
            BadImage: `aspect`.
        """
        settings = self.settings
        height, width = settings.smart_resize(image.height, image.width)
        image = to_rgb(image)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return self._patches(image), (1, height // settings.patch_size, width // settings.patch_size)

    def normalise(self, patches: np.ndarray) -> np.ndarray:
        """float32 [N, C * T * P * P], transformers' `pixel_values`, from uint8 patches [N, C * P * P] of one or more pictures."""
        pairs = np.ascontiguousarray(patches).reshape(len(patches), CHANNELS, -1).view(np.uint16)
        frames = self.settings.temporal_patch_size
        out = np.empty((len(pairs), CHANNELS, frames, pairs.shape[2]), np.uint64)
        for start in range(0, len(pairs), BLOCK):
            block = slice(start, start + BLOCK)
            for channel in range(CHANNELS):
                out[block, channel] = self._pairs[channel][pairs[block, channel]][:, None]
        return out.view(np.float32).reshape(len(pairs), -1)

    def _patches(self, image: Image.Image) -> np.ndarray:
        """uint8 [N, C * P * P]"""
        P, M = self.settings.patch_size, self.settings.merge_size
        down, across = image.height // (P * M), image.width // (P * M)
        row = np.dtype((np.void, P))  # a patch's row of pixels is moved as one item
        patches = np.empty((down, across, M, M, CHANNELS, P), row)
        for channel, band in enumerate(image.split()):
            rows = np.asarray(band).view(row).reshape(down, M, P, across, M)
            patches[:, :, :, :, channel] = rows.transpose(0, 3, 1, 4, 2)
        return patches.view(np.uint8).reshape(-1, CHANNELS * P * P)


def image_tokens(grid: tuple[int, int, int], merge_size: int) -> int:
    """Tokens that stand for a picture of this grid of patches (frames, rows, columns)."""
    frames, rows, columns = grid
    if rows % merge_size or columns % merge_size:
        raise InputError(f"The grid {grid} is not a multiple of merge_size {merge_size} in rows and columns.")
    return frames * rows * columns // merge_size**2
