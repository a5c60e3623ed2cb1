"""Pictures, conversations and mixtures in packs: what a model sees of each, whatever the number of ranks."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from moexpand.base.errors import InputError
from moexpand.base.files import write_json
from moexpand.data.dataset import SUMMARY, summary_of
from moexpand.data.images import ImageProcessor, ImageSettings
from moexpand.data.loader import MicroBatch, PackedData
from moexpand.data.parts import Part
from moexpand.data.shards import Sample, write_shard
from moexpand.data.stream import Reading, Source
from moexpand.data.tokens import load_tokenizer

SEQ, BATCH = 256, 8
IMAGES = ImageSettings(min_pixels=32 * 32, max_pixels=160 * 160)
WITH_IMAGES = Reading(images=IMAGES)


def picture(path: Path, width: int, height: int, seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def write_set(folder: Path, samples: list[Sample], shard_samples: int = 16) -> Path:
    """A shard folder as the build writes it."""
    folder.mkdir()
    entries = [
        write_shard(folder, number, samples[begin : begin + shard_samples], "qwen-8192")
        for number, begin in enumerate(range(0, len(samples), shard_samples))
    ]
    write_json(folder / SUMMARY, summary_of(load_tokenizer("qwen-8192"), entries, {}, {}))
    return folder


def words(number: int, count: int) -> str:
    rng = np.random.default_rng(number)
    return f"Sample {number}: " + " ".join(rng.choice(["the", "expert", "router", "token", "loss", "falls", "rises"], count))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """48 samples: texts, pictures of many sizes with captions, and two pictures between texts."""
    folder = tmp_path_factory.mktemp("multimodal")
    samples = []
    for number in range(48):
        sides = np.random.default_rng(number).integers(20, 300, 4).tolist()
        text: Part = {"text": words(number, 5 + 3 * number % 60)}
        if number % 3 == 0:
            samples.append(Sample(f"text-{number:02d}", "text", [text]))
        elif number % 3 == 1:
            image = picture(folder / f"{number}.png", *sides[:2], number)
            samples.append(Sample(f"figure-{number:02d}", "figure", [{"image": "png"}, text], {}, {"png": image}))
        else:
            images = {f"{i}.png": picture(folder / f"{number}-{i}.png", *sides[2 * i : 2 * i + 2], number + i) for i in range(2)}
            parts = [
                {"text": "Look:"},
                {"image": "0.png"},
                text,
                {"image": "1.png"},
                {"text": " <|image_pad|> end", "loss": False},
            ]
            samples.append(Sample(f"both-{number:02d}", "image", parts, {}, images))
    return write_set(folder / "shards", samples), samples


def expected(sample: Sample) -> tuple[list[int], list[bool], list[np.ndarray]]:
    """Ids, what is trained on, and patches of a sample, from transformers' processor and the tokenizer alone."""
    tokenizer = load_tokenizer("qwen-8192")
    special = tokenizer.specials
    theirs = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": IMAGES.min_pixels, "longest_edge": IMAGES.max_pixels},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    ids: list[int] = []
    loss: list[bool] = []
    patches = []
    for part in sample.parts:
        if "image" in part:
            out = theirs(Image.open(sample.images[part["image"]]), return_tensors="np")
            patches.append(out["pixel_values"])
            count = int(out["image_grid_thw"][0].prod()) // 4
            ids += [special["<|vision_start|>"], *[special["<|image_pad|>"]] * count, special["<|vision_end|>"]]
            loss += [False] * (count + 2)
        else:
            text = tokenizer.encode(part["text"])
            ids += text
            loss += [part.get("loss", True)] * len(text)
    return [*ids, tokenizer.eos_id], [*loss, loss[-1]], patches


def pieces(batches: list[MicroBatch]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Tokens of every segment -> its loss mask."""
    found = {}
    for batch in batches:
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            if len(set(batch.tokens[begin:end].tolist())) > 1:  # padding is one token
                found[tuple(batch.tokens[begin:end].tolist())] = tuple(batch.loss_mask[begin:end].astype(int).tolist())
    return found


def epoch(data: PackedData) -> list[MicroBatch]:
    steps = -(-data.packs_per_epoch // data.global_batch)
    return [batch for step in range(steps) for batch in data.batch(step)]


def test_a_sample_with_pictures_is_what_transformers_makes_of_it(made):
    shards, samples = made
    data = PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=WITH_IMAGES)
    assert not data.left_out()
    batches = epoch(data)
    wanted, pixels = {}, {}
    for sample in samples:
        ids, loss, patches = expected(sample)
        wanted[tuple(ids)] = (*(int(flag) for flag in loss[1:]), 0)
        pixels[tuple(ids)] = patches
    assert pieces(batches) == wanted
    for batch in batches:
        mine = []
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            mine += pixels.get(tuple(batch.tokens[begin:end].tolist()), [])
        if mine:
            assert np.array_equal(ImageProcessor(IMAGES).normalise(batch.patches), np.concatenate(mine))
            assert batch.grids.prod(axis=1).tolist() == [len(patches) for patches in mine]
        else:
            assert batch.patches is None
            assert batch.grids is None


def test_without_pictures_the_same_texts_are_trained_on(made):
    shards, samples = made
    vision = {load_tokenizer("qwen-8192").specials[name] for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")}
    got = pieces(epoch(PackedData(shards, SEQ, 1, seed=1, held_out=0.0)))
    wanted = {tuple(token for token in expected(sample)[0] if token not in vision) for sample in samples}
    assert set(got) == wanted


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (2, 2), (1, 4)]), st.integers(0, 40))
def test_pictures_are_the_same_and_level_for_every_number_of_ranks(made, layout, step):
    ranks, micro_batch = layout
    data = PackedData(made[0], SEQ, BATCH, seed=3, held_out=0.0, reading=WITH_IMAGES)
    whole = data.batch(step, micro_batch=micro_batch)
    shared = [batch for rank in range(ranks) for batch in data.batch(step, rank, ranks, micro_batch)]
    # As sets: which rank computes a micro-batch depends on their number.
    assert sorted(batch.tokens.tobytes() for batch in whole) == sorted(batch.tokens.tobytes() for batch in shared)
    patches = {batch.tokens.tobytes(): batch.patches for batch in whole}
    assert all(np.array_equal(batch.patches, patches[batch.tokens.tobytes()]) for batch in shared if batch.patches is not None)
    pad = data.tokenizer.specials["<|image_pad|>"]
    counted = [sum(int((b.tokens == pad).sum()) for b in data.batch(step, rank, ranks, micro_batch)) for rank in range(ranks)]
    assert counted == data.vision_tokens(step, ranks, micro_batch).tolist()


def test_a_picture_that_does_not_fit_a_pack_is_left_out_and_told(made):
    data = PackedData(made[0], 48, 1, seed=1, held_out=0.0, reading=Reading(images=IMAGES))
    fitting = sum(len(expected(sample)[0]) <= 48 for sample in made[1] if sample.images)
    left = sum(bool(sample.images) for sample in made[1]) - fitting
    assert left > 0
    assert data.left_out() == [f"{left} of 48 samples of {made[0]} with images are longer than 48 tokens and are left out"]
    assert all((np.diff(batch.cu_seqlens) <= 48).all() for batch in epoch(data))


def test_a_damaged_picture_costs_its_own_sample(made, tmp_path):
    shards = Path(shutil.copytree(made[0], tmp_path / "shards"))
    whole = pieces(epoch(PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=WITH_IMAGES)))
    data = PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=WITH_IMAGES)
    corpus = data.streams[0].corpus
    content = io.BytesIO()
    Image.new("RGB", (40, 40)).save(content, "PNG")
    sample = corpus.key.tolist().index(b"figure-01")
    member = next(m for m in range(*corpus._member_first[sample : sample + 2]) if corpus._member_name[m] == b"png")
    tar = shards / "shard-000000.tar"
    tampered = bytearray(tar.read_bytes())
    tampered[corpus._member_offset[member] + 60] ^= 255
    tar.write_bytes(tampered)
    with pytest.raises(InputError, match=r"figure-01\.png of .* does not have the CRC32"):
        epoch(PackedData(shards, SEQ, 1, seed=1, held_out=0.0, reading=WITH_IMAGES))
    tolerant = PackedData(shards, SEQ, 1, seed=1, held_out=0.0, max_bad_fraction=0.05, reading=WITH_IMAGES)
    left = pieces(epoch(tolerant))
    assert list(tolerant.bad_samples) == ["figure-01"]
    assert len(whole.keys() - left.keys()) == 1
    assert left.keys() <= whole.keys()


def test_conversations_train_on_their_marked_parts_alone_unless_all_text_is_asked_for(tmp_path):
    tokenizer = load_tokenizer("qwen-8192")
    parts: list[Part] = [
        {"text": "<|im_start|>user\n", "special": True, "loss": False},
        {"text": "What is <|im_end|>?", "loss": False},
        {"text": "<|im_end|>\n<|im_start|>assistant\n", "special": True, "loss": False},
        {"text": "A mark."},
        {"text": "<|im_end|>", "special": True},
    ]
    shards = write_set(tmp_path / "shards", [Sample("chat-0", "chat", parts)])
    (batch,) = PackedData(shards, SEQ, 1, seed=0, held_out=0.0).batch(0)
    trained = [int(label) for label in batch.labels[batch.loss_mask > 0]]
    assert trained == [*tokenizer.encode("A mark."), tokenizer.specials["<|im_end|>"], tokenizer.eos_id]
    assert (batch.tokens == tokenizer.specials["<|im_end|>"]).sum() == 2  # the user's is ten characters
    everything = Reading(answers_only=False)
    data = PackedData(shards, SEQ, 1, seed=0, held_out=0.0, reading=everything)
    (batch,) = data.batch(0)
    assert data.loss_tokens().tolist() == [batch.loss_mask.sum()]  # what calibration counts on
    assert batch.loss_mask.sum() == batch.cu_seqlens[1] - 1
    kept = json.loads((shards / SUMMARY).read_text())
    assert kept["shards"][0]["samples"] == 1


# ------------------------------------------------------------------ mixtures


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("many", 200), ("few", 40)):
        write_set(folder / name, [Sample(f"{name}-{i:03d}", "text", [{"text": f"{name} " + words(i, 30)}]) for i in range(count)])
    return [Source(str(folder / "many"), 3.0), Source(str(folder / "few"), 1.0)]


def test_a_mixture_counts_the_tokens_of_its_sources_and_reads_each_once_an_epoch(two):
    data = PackedData(two, 128, BATCH, seed=0, held_out=0.0)
    marks = {name: tuple(data.tokenizer.encode(name)) for name in ("many", "few")}
    seen: dict[str, list[tuple[int, ...]]] = {"many": [], "few": []}
    read = dict.fromkeys(marks, 0)
    for step in range(12):
        counted = data.tokens_of(step)
        mine = dict.fromkeys(marks, 0)
        for batch in data.batch(step):
            for segment in pieces([batch]):
                name = next(name for name, mark in marks.items() if segment[: len(mark)] == mark)
                mine[name] += len(segment)
                seen[name].append(segment)
        assert counted == mine
        read = {name: read[name] + counted[name] for name in read}
    share = read["many"] / sum(read.values())
    assert 0.7 < share < 0.8
    epochs = data.epochs_at(12)
    for name, count in (("many", 200), ("few", 40)):
        assert epochs[name] == pytest.approx(len(seen[name]) / count, rel=0.1)
        first = seen[name][:count] if epochs[name] > 1 else seen[name]
        assert len(set(first)) == len(first)


def test_a_source_is_not_read_more_often_than_allowed(two):
    many, few = two
    limited = [many, Source(few.place, few.weight, max_epochs=2)]
    data = PackedData(limited, 128, BATCH, seed=0, held_out=0.0)
    data.check_epochs(10)
    with pytest.raises(InputError, match=r"1000 steps would read .*few [\d.]+ times, and it may be read 2 times"):
        data.check_epochs(1000)


def test_evaluation_of_a_mixture_takes_from_both(two):
    data = PackedData(two, 128, BATCH, seed=0, held_out=0.3)
    marks = {tuple(data.tokenizer.encode(name)) for name in ("many", "few")}
    found = {segment[: len(mark)] for segment in pieces(data.held_out(8)) for mark in marks if segment[: len(mark)] == mark}
    assert found == marks
