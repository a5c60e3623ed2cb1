"""The loader against plain webdataset on the same shards, and what planning, seeking and sharing cost; one process, in turns.

`python bench/loader.py [rounds [shards]]`: prints medians and ratios; with a folder of shards also how full its packs are and how
equal the ranks' tokens of images. Packs with pictures are compared with transformers' picture processor, which a user of
webdataset would take, on the same bits, and with our own in its place: what then differs is reading and packing alone.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import webdataset
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from moexpand.base.files import write_json
from moexpand.data.dataset import SUMMARY, Corpus, summary_of
from moexpand.data.image_decode import decode_image
from moexpand.data.images import ImageProcessor, ImageSettings, image_tokens
from moexpand.data.loader import PackedData
from moexpand.data.planning import WINDOW, PackSequence, SampleOrder
from moexpand.data.shards import Sample, cached_tokenizer, write_shard
from moexpand.data.stream import Reading

TOKENIZER = "qwen-8192"
SEQ, BATCH = 4096, 8
IMAGES = ImageSettings(max_pixels=512 * 512)
OURS = ImageProcessor(IMAGES)
THEIRS: Any = Qwen2VLImageProcessorPil(
    patch_size=IMAGES.patch_size,
    size={"shortest_edge": IMAGES.min_pixels, "longest_edge": IMAGES.max_pixels},
    image_mean=list(IMAGES.image_mean),
    image_std=list(IMAGES.image_std),
)


def write_set(folder: Path, samples: list[Sample], shard_samples: int) -> None:
    """A shard folder as `moexpand data build` writes it."""
    folder.mkdir()
    entries = [
        write_shard(folder, number, samples[begin : begin + shard_samples], TOKENIZER)
        for number, begin in enumerate(range(0, len(samples), shard_samples))
    ]
    write_json(folder / SUMMARY, summary_of(cached_tokenizer(TOKENIZER), entries, {}, {}))


def make_sets(folder: Path) -> None:
    """20,000 short texts, and 300 pictures with captions."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "expert", "router", "token", "loss", "model", "falls", "rises", "while", "each", "of", "many"])

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    write_set(folder / "texts", [Sample(f"t{i:06d}", "text", [{"text": text(60)}]) for i in range(20_000)], 1000)
    pictured = []
    for i in range(300):
        width, height = rng.integers(300, 700, 2).tolist()
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        pictured.append(Sample(f"f{i:06d}", "figure", [{"image": "png"}, {"text": text(40)}], {}, {"png": path}))
    write_set(folder / "pictures", pictured, 100)


def tars(folder: Path) -> list[str]:
    """The shards of a folder."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


Pixels = Callable[[bytes], tuple[np.ndarray, int]]
"""A picture's patches, and its tokens."""


def theirs_read(folder: Path) -> Iterator[int]:
    """webdataset: shuffled shards and a shuffle buffer of 1,000; texts as strings."""
    for sample in webdataset.WebDataset(tars(folder), shardshuffle=100, seed=0).shuffle(1000):
        sample["txt"].decode()
        yield 1


def ours_read(folder: Path) -> Iterator[int]:
    """Ours: every sample in the order of an epoch, each member checked against its CRC32."""
    corpus = Corpus(folder)
    for sample in SampleOrder(len(corpus), 0).samples(0, 0).tolist():
        corpus.text(sample)
        yield 1


def transformers_pixels(content: bytes) -> tuple[np.ndarray, int]:
    """Normalised patches and tokens of a picture, by Pillow and transformers."""
    made = THEIRS(Image.open(BytesIO(content)), return_tensors="np")
    return made["pixel_values"], int(made["image_grid_thw"].prod()) // IMAGES.merge_size**2


def our_pixels(content: bytes) -> tuple[np.ndarray, int]:
    """Patches as bytes, and tokens of a picture."""
    patches, grid = OURS.process(decode_image(content))
    return patches, image_tokens(grid, IMAGES.merge_size)


def theirs_pack(folder: Path, pixels_of: Pixels = our_pixels) -> Iterator[int]:
    """webdataset and the same tokenizer; samples, with a token for each block of patches, are concatenated and cut into packs."""
    tokenizer = cached_tokenizer(TOKENIZER)
    held: list[int] = []
    pixels: list[np.ndarray] = []
    for sample in webdataset.WebDataset(tars(folder), shardshuffle=100, seed=0).shuffle(1000):
        if "png" in sample:
            patches, tokens = pixels_of(sample["png"])
            pixels.append(patches)
            held += [tokenizer.eos_id] * tokens
        held += [*tokenizer.encode(sample["txt"].decode()), tokenizer.eos_id]
        while len(held) >= SEQ:
            np.array(held[:SEQ])
            held = held[SEQ:]
            if pixels:
                np.concatenate(pixels)
                pixels = []
        yield 1


def ours_pack(folder: Path, normalised: bool = False) -> Iterator[int]:
    """Ours: whole micro-batches with labels, masks, positions and boundaries; pictures as bytes, or normalised on the CPU."""
    pictures = folder.name == "pictures"
    data = PackedData(folder, SEQ, BATCH, 0, held_out=0.0, reading=Reading(images=IMAGES if pictures else None))
    step = 0
    while True:
        batches = data.batch(step)
        if normalised:
            for batch in batches:
                if batch.patches is not None:
                    OURS.normalise(batch.patches)
        # A segment without a token to predict is a pack's padding.
        yield sum(int((np.add.reduceat(batch.loss_mask, batch.cu_seqlens[:-1]) > 0).sum()) for batch in batches)
        step += 1


def rate(read: Callable[[Path], Iterator[int]], folder: Path, samples: int) -> float:
    """Samples a second until at least so many are ready, opening included."""
    began = time.perf_counter()
    count = 0
    for made in read(folder):
        count += made
        if count >= samples:
            break
    return count / (time.perf_counter() - began)


def compare(rounds: int, folder: Path) -> None:
    """Samples a second of both, interleaved."""
    print(
        f"webdataset {webdataset.__version__}, transformers {transformers.__version__}, numpy {np.__version__}; one process,"
        f" medians of {rounds} interleaved rounds"
    )
    texts, pictures = folder / "texts", folder / "pictures"
    by_transformers = partial(theirs_pack, pixels_of=transformers_pixels)
    for name, ours, theirs, place, samples in (
        ("reading texts", ours_read, theirs_read, texts, 20_000),
        ("packs of tokens", ours_pack, theirs_pack, texts, 20_000),
        ("pictures, transformers there", ours_pack, by_transformers, pictures, 300),
        ("normalised here too", partial(ours_pack, normalised=True), by_transformers, pictures, 300),
        ("pictures, our processor there", ours_pack, theirs_pack, pictures, 300),
    ):
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            found["ours"].append(rate(ours, place, samples))
            found["theirs"].append(rate(theirs, place, samples))
        mine, other = (statistics.median(found[which]) for which in ("ours", "theirs"))
        print(f"{name:30s} {mine:10,.0f} samples/s   webdataset {other:10,.0f}   ratio {mine / other:.2f}x")


def planning(folder: Path) -> None:
    """Samples planned a second of processor time, and seconds to find a far step."""
    rng = np.random.default_rng(0)
    count = 2_000_000
    for seq_length in (4096, 8192, 32_768):
        lengths = np.clip(rng.lognormal(6.3, 1.0, count).astype(np.int64), 1, 4 * seq_length)
        sequence = PackSequence(lengths, SampleOrder(count, 0), seq_length, 0)
        began = time.process_time()
        for window in range(8):
            sequence.window(0, window)
        planned = 8 * WINDOW / (time.process_time() - began)
        began = time.process_time()
        packs = sequence.packs_of_epoch(0)
        counted = count / (time.process_time() - began)
        fill = lengths.sum() / (packs * seq_length)
        print(f"packs of {seq_length:6d}: {planned:12,.0f} samples/s planned, {counted:12,.0f} counted, fill {fill:.4%}")
    batch, step = 32, 1_000_000
    began = time.perf_counter()
    PackSequence(lengths, SampleOrder(count, 0), seq_length, 0, folder / "plans", "bench").segments(batch * step)
    first = time.perf_counter() - began
    began = time.perf_counter()
    PackSequence(lengths, SampleOrder(count, 0), seq_length, 0, folder / "plans", "bench").segments(batch * step)
    again = time.perf_counter() - began
    print(f"step {step:,} of {batch} packs over {count:,} samples: {first:.1f} s the first time, then {again:.3f} s")


def shares(shards: str) -> None:
    """Fill, and tokens of images of the fullest rank over the mean."""
    for seq_length, (ranks, each) in product((4096, 8192), ((2, 8), (4, 8), (8, 8))):
        data = PackedData(shards, seq_length, ranks * each, 0, held_out=0.0, reading=Reading(images=IMAGES))
        steps = max(1, data.packs_per_epoch // data.global_batch)
        loads = [data.vision_tokens(step, ranks) for step in range(steps)]
        over = [load.max() / load.mean() for load in loads if load.any()]
        print(
            f"packs of {seq_length}, {ranks} ranks of {each}: fill {data.fill:.2%}, tokens of images of the fullest rank over"
            f" the mean: median {statistics.median(over):.3f}, largest {max(over):.3f} of {len(over)} steps"
        )
    for sentence in data.left_out():
        print(sentence)


def main(rounds: int, shards: str | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_sets(folder)
        compare(rounds, folder)
        planning(folder)
    if shards:
        shares(shards)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2] if len(sys.argv) > 2 else None)
