"""Pictures to patches: ours against transformers' `Qwen2VLImageProcessorPil`, same pictures, same bits, taking turns.

Parts: `process` (a decoded picture to normalised patches and to bytes; of a size to be resampled and of one that is not; beside
it Pillow's bicubic alone, which both must do: the floor), `decode` (bytes to RGB: ours against `Image.open` and
transformers' conversion) and `plan` (tokens of a million sizes against the scalar). Medians, minima and maxima of processor time,
which neighbours on a shared machine disturb least; ratios are of medians of the same run. Bits are compared before anything is
timed. `python bench/images.py [rounds=15]`; all of it is single-threaded.
"""

import io
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from moexpand.data.image_decode import decode_image
from moexpand.data.images import ImageProcessor, ImageSettings

SIZES = {
    "770x1033 resampled": (1033, 770),
    "768x1024 as it is": (1024, 768),
    "300x400 resampled": (400, 300),
    "3000x4000 resampled": (4000, 3000),
}
PLANNED = 1_000_000


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every run; all take turns, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds


def show(title: str, seconds: dict[str, list[float]], base: str) -> None:
    """One line a run, with the ratio of the base's median to its own."""
    print(title)
    for name, measured in seconds.items():
        ratio = statistics.median(seconds[base]) / statistics.median(measured)
        spread = f"({min(measured) * 1e3:.2f} to {max(measured) * 1e3:.2f})"
        print(f"  {name:34} {statistics.median(measured) * 1e3:9.2f} ms {spread:22} {ratio:6.2f} x")


def picture(width: int, height: int) -> Image.Image:
    """Smooth shapes with some noise, as a figure or photograph has."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(base, np.int16) + rng.integers(-6, 7, (height, width, 3))).clip(0, 255).astype(np.uint8))


def bench_process(rounds: int) -> None:
    settings = ImageSettings()
    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    mean_std = {"image_mean": list(settings.image_mean), "image_std": list(settings.image_std)}
    theirs: Any = Qwen2VLImageProcessorPil(patch_size=settings.patch_size, size=size, **mean_std)
    ours = ImageProcessor(settings)
    for name, (width, height) in SIZES.items():
        image = picture(width, height)
        if theirs(image)["pixel_values"].tobytes() != ours.normalise(ours.process(image)[0]).tobytes():
            raise SystemExit(f"The patches of {name} differ: nothing was timed.")
        new_height, new_width = settings.smart_resize(height, width)
        runs = {
            "transformers": lambda image=image: theirs(image),
            "ours, normalised here": lambda image=image: ours.normalise(ours.process(image)[0]),
            "ours, bytes for the device": lambda image=image: ours.process(image),
            "resampling alone": lambda image=image, to=(new_width, new_height): image.resize(to, Image.Resampling.BICUBIC),
        }
        show(f"process, {name}", interleaved(runs, max(3, rounds // 3) if width > 2000 else rounds), "transformers")


def bench_decode(rounds: int) -> None:
    image = picture(1033, 770)
    for format in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        image.save(file, format)
        content = file.getvalue()
        runs = {
            "Image.open, convert_to_rgb": lambda content=content: convert_to_rgb(
                Image.open(io.BytesIO(content)), return_numpy=True
            ),
            "ours": lambda content=content: decode_image(content),
        }
        show(f"decode, 770x1033 {format} of {len(content) >> 10} KiB", interleaved(runs, rounds), "Image.open, convert_to_rgb")


def bench_plan(rounds: int) -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(100, 5000, (2, PLANNED))
    settings = ImageSettings()
    part = PLANNED // 100
    sizes = list(zip(heights[:part].tolist(), widths[:part].tolist(), strict=True))

    def scalar() -> list[int]:
        resized = (smart_resize(*size, settings.factor, settings.min_pixels, settings.max_pixels) for size in sizes)
        return [height * width // settings.factor**2 for height, width in resized]

    if scalar() != settings.vision_tokens(heights[:part], widths[:part]).tolist():
        raise SystemExit("The planned tokens differ: nothing was timed.")
    seconds = interleaved({"scalar": scalar, "ours": lambda: settings.vision_tokens(heights, widths)}, rounds)
    scalar_rate, our_rate = part / statistics.median(seconds["scalar"]), PLANNED / statistics.median(seconds["ours"])
    print("plan")
    print(f"  transformers' smart_resize {scalar_rate:13,.0f} pictures/s")
    print(f"  ours {our_rate:35,.0f} pictures/s  {our_rate / scalar_rate:.0f} x")


def main() -> None:
    rounds = int(next((word.removeprefix("rounds=") for word in sys.argv[1:] if word.startswith("rounds=")), "15"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "pillow", "numpy"))
    print(f"Python {platform.python_version()}, {packages}; medians of {rounds} rounds (minimum to maximum)")
    bench_process(rounds)
    bench_decode(rounds)
    bench_plan(rounds)


if __name__ == "__main__":
    main()
