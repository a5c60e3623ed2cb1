"""Batches are a function of (shards, seed, step): the same for every layout, every sample once an epoch, nothing crosses."""

import json
import math
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.index import ShardIndex, index_name, parse_index
from moexpand.data.loader import MicroBatch, PackedData, unigram_entropy
from moexpand.data.stream import Reading
from moexpand.data.tokens import load_tokenizer

SEQ = 128
BATCH = 8


def read_tars(shards: Path) -> dict[str, list[int]]:
    """Ids of every sample, end of text included, read without the loader: plain tarfile, plain tokenizer."""
    tokenizer = load_tokenizer("qwen-8192")
    samples = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    text = tar.extractfile(member).read().decode()
                    samples[member.name.removesuffix(".txt")] = [*tokenizer.encode(text), tokenizer.eos_id]
    return samples


def segments(batches: list[MicroBatch]) -> list[tuple[int, ...]]:
    """Tokens of every segment that is not padding alone."""
    found = []
    for batch in batches:
        for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            # A chunk of one token has no label; padding is nothing but end-of-text tokens without labels.
            if batch.loss_mask[begin:end].any() or (end - begin == 1):
                found.append(tuple(batch.tokens[begin:end].tolist()))
    return found


def same(left: MicroBatch, right: MicroBatch) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("tokens", "labels", "loss_mask", "positions", "cu_seqlens")
    )


@pytest.fixture(scope="module")
def data(corpus: Path) -> PackedData:
    return PackedData(corpus, SEQ, BATCH, seed=1, held_out=0.1)


def test_a_segment_is_a_piece_of_one_sample_and_labels_stay_inside(corpus, data):
    samples = list(read_tars(corpus).values())
    chunks = {tuple(ids[i : i + SEQ]) for ids in samples for i in range(0, len(ids), SEQ)}
    for step in range(5):
        for batch in data.batch(step, micro_batch=2):
            assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == np.int64
            assert batch.loss_mask.dtype == np.float32
            assert batch.cu_seqlens.dtype == np.int32
            assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, 2 * SEQ)
            assert SEQ in batch.cu_seqlens  # no segment crosses from one pack to the next
            for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                assert end > begin
                assert batch.positions[begin:end].tolist() == list(range(end - begin))
                assert batch.loss_mask[end - 1] == 0
                if batch.loss_mask[begin:end].any():
                    assert batch.loss_mask[begin : end - 1].all()
                    assert tuple(batch.tokens[begin:end].tolist()) in chunks
                    assert np.array_equal(batch.labels[begin : end - 1], batch.tokens[begin + 1 : end])


def test_every_training_sample_is_seen_once_an_epoch_and_no_held_out_one(corpus):
    data = PackedData(corpus, SEQ, 1, seed=1, held_out=0.1)
    samples = read_tars(corpus)
    trained = Counter(piece for step in range(data.packs_per_epoch) for piece in segments(data.batch(step)))
    evaluated = Counter(segments(data.held_out(10**6)))
    cut = {key: Counter(tuple(ids[i : i + SEQ]) for i in range(0, len(ids), SEQ)) for key, ids in samples.items()}
    # A last chunk of the end-of-text token alone looks like padding; it carries no label either way.
    lonely = (load_tokenizer("qwen-8192").eos_id,)
    everything = sum(cut.values(), Counter())
    assert {k: v for k, v in (trained + evaluated).items() if k != lonely} == {k: v for k, v in everything.items() if k != lonely}
    assert not (trained.keys() & evaluated.keys()) - {lonely}
    held = sum(not (pieces.keys() - {lonely}) - evaluated.keys() for pieces in cut.values())
    assert 0.02 < held / len(samples) < 0.25


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 400), ranks=st.sampled_from([1, 2, 4]), micro_batch=st.sampled_from([1, 2]))
def test_the_global_batch_is_the_same_for_every_number_of_ranks(data, step, ranks, micro_batch):
    whole = data.batch(step, micro_batch=micro_batch)
    parts = [data.batch(step, rank, ranks, micro_batch) for rank in range(ranks)]
    shared = [parts[m % ranks][m // ranks] for m in range(BATCH // micro_batch)]
    assert len(whole) == len(shared)
    assert all(same(left, right) for left, right in zip(whole, shared, strict=True))
    single = data.batch(step)
    joined = np.concatenate([batch.tokens for batch in whole])
    assert np.array_equal(joined, np.concatenate([batch.tokens for batch in single]))


@settings(max_examples=15, deadline=None)
@given(switch=st.integers(0, 20), before=st.sampled_from([1, 2, 4, 8, 16, 32]), after=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_a_run_goes_on_with_the_same_global_batches_on_any_number_of_ranks(corpus, switch, before, after):
    """A step on some ranks and the next one, by loaders opened anew, on others: what one that never stopped gives."""

    def read(step: int, ranks: int) -> list[bytes]:
        data = PackedData(corpus, SEQ, 32, seed=1, held_out=0.1)
        return sorted(batch.tokens.tobytes() for rank in range(ranks) for batch in data.batch(step, rank, ranks))

    straight = PackedData(corpus, SEQ, 32, seed=1, held_out=0.1)
    for step, ranks in ((switch, before), (switch + 1, after)):
        assert read(step, ranks) == sorted(batch.tokens.tobytes() for batch in straight.batch(step))


def test_a_step_does_not_depend_on_what_was_read_before(corpus, data):
    late = 3 * data.packs_per_epoch // BATCH + 1
    fresh = PackedData(corpus, SEQ, BATCH, seed=1, held_out=0.1).batch(late)
    for step in (0, late + 5, 2):
        data.batch(step)
    assert all(same(left, right) for left, right in zip(fresh, data.batch(late), strict=True))


def test_epochs_and_seeds_have_different_orders(corpus, data):
    other = PackedData(corpus, SEQ, BATCH, seed=2, held_out=0.1)
    assert not same(data.batch(0)[0], other.batch(0)[0])
    assert not same(data.batch(0)[0], data.batch(data.packs_per_epoch // BATCH + 1)[0])
    held, again = data.held_out(4), other.held_out(4)
    assert all(same(left, right) for left, right in zip(held, again, strict=True))


def test_layouts_that_do_not_divide_the_global_batch_are_refused(data):
    with pytest.raises(InputError, match="cannot be shared by 3 data-parallel ranks"):
        data.batch(0, rank=0, ranks=3)
    with pytest.raises(InputError, match="micro-batches of 4"):
        data.batch(0, rank=0, ranks=4, micro_batch=4)


def test_the_last_evaluation_batch_is_filled_up_with_masked_packs(data):
    batches = data.held_out(3, micro_batch=2)
    assert [len(batch.tokens) for batch in batches] == [2 * SEQ, 2 * SEQ]
    assert batches[-1].loss_mask[SEQ:].sum() == 0
    assert batches[-1].cu_seqlens[-2] == SEQ


def test_fill_is_counted_from_the_batches(corpus):
    data = PackedData(corpus, SEQ, 1, seed=1, held_out=0.0)
    tokens = sum(len(ids) for ids in read_tars(corpus).values())
    assert data.fill == pytest.approx(tokens / (data.packs_per_epoch * SEQ))
    assert data.fill > 0.9


def test_unigram_entropy_is_the_entropy_of_the_counts(data):
    batches = data.held_out(10**6)
    targets = Counter(int(label) for batch in batches for label in batch.labels[batch.loss_mask > 0])
    total = sum(targets.values())
    assert unigram_entropy(batches) == pytest.approx(-sum(n / total * math.log(n / total) for n in targets.values()))


def test_another_tokenizer_than_the_index_is_refused(corpus):
    with pytest.raises(InputError, match="were indexed with the tokenizer qwen-8192"):
        PackedData(corpus, SEQ, BATCH, seed=0, tokenizer="qwen")


def test_the_saved_tokenizer_is_the_same_tokenizer(corpus, data, tmp_path):
    load_tokenizer("qwen-8192").save(tmp_path)
    other = PackedData(corpus, SEQ, BATCH, seed=1, held_out=0.1, tokenizer=str(tmp_path))
    assert all(same(left, right) for left, right in zip(data.batch(3), other.batch(3), strict=True))


# ------------------------------------------------------------------ damage


@pytest.fixture
def damaged(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(corpus, tmp_path / "shards"))


def index_of(tar: Path) -> ShardIndex:
    path = tar.with_name(index_name(tar.name))
    return parse_index(path.read_bytes(), tar.name, str(path))


def text_members(index: ShardIndex) -> list[int]:
    """The .txt member of every sample."""
    return [member for member, name in enumerate(index.member_name) if name == b"txt"]


def flip_a_text(shards: Path) -> str:
    """Flip one bit in the middle of a text of the second shard; returns its key."""
    tar = shards / "shard-000001.tar"
    index = index_of(tar)
    member = text_members(index)[7]
    content = bytearray(tar.read_bytes())
    content[index.member_offset[member] + index.member_size[member] // 2] ^= 1
    tar.write_bytes(content)
    return index.key[7].decode()


def read_everything(data: PackedData) -> list[MicroBatch]:
    return [batch for step in range(data.packs_per_epoch) for batch in data.batch(step)]


def test_a_flipped_bit_is_found_and_named(damaged):
    key = flip_a_text(damaged)
    data = PackedData(damaged, SEQ, 1, seed=0, held_out=0.0)
    with pytest.raises(InputError, match=rf"{key}\.txt of .*shard-000001\.tar does not have the CRC32"):
        read_everything(data)


def test_an_allowed_bad_sample_is_masked_and_counted_and_moves_nothing(corpus, damaged):
    key = flip_a_text(damaged)
    whole = read_everything(PackedData(corpus, SEQ, 1, seed=0, held_out=0.0))
    data = PackedData(damaged, SEQ, 1, seed=0, held_out=0.0, max_bad_fraction=0.01)
    read = read_everything(data)
    assert list(data.bad_samples) == [key]
    assert all(np.array_equal(a.cu_seqlens, b.cu_seqlens) for a, b in zip(whole, read, strict=True))
    lost = sum(int((a.loss_mask - b.loss_mask).sum()) for a, b in zip(whole, read, strict=True))
    length = len(read_tars(corpus)[key])
    assert lost == length - -(-length // SEQ)
    for a, b in zip(whole, read, strict=True):
        kept = b.loss_mask > 0
        assert np.array_equal(a.labels[kept], b.labels[kept])


def test_too_many_bad_samples_stop_the_run(damaged):
    index = index_of(damaged / "shard-000000.tar")
    content = bytearray((damaged / "shard-000000.tar").read_bytes())
    for member in text_members(index)[:5]:
        content[index.member_offset[member]] ^= 1
    (damaged / "shard-000000.tar").write_bytes(content)
    data = PackedData(damaged, SEQ, 1, seed=0, held_out=0.0, max_bad_fraction=0.02)
    with pytest.raises(InputError, match=r"4 of 160 samples are unreadable, and data\.max_bad_fraction=0\.02 allows 3"):
        read_everything(data)


def test_truncated_shard_is_named(damaged):
    tar = damaged / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(InputError, match=r"shard-000002\.tar has \d+ bytes, and its index says \d+: it is truncated"):
        PackedData(damaged, SEQ, 1, seed=0)
    data = PackedData(damaged, SEQ, 1, seed=0, max_bad_fraction=0.2)
    assert 10 < len(data.bad_samples) < 30
    assert any(batch.loss_mask.any() for batch in read_everything(data))


def test_missing_shard_and_missing_index_are_named(damaged):
    (damaged / "shard-000003.index.npz").rename(damaged / "elsewhere")
    with pytest.raises(InputError, match=r"shard-000003\.index\.npz does not exist"):
        PackedData(damaged, SEQ, 1, seed=0)
    (damaged / "elsewhere").rename(damaged / "shard-000003.index.npz")
    (damaged / "shard-000003.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000003\.tar does not exist"):
        PackedData(damaged, SEQ, 1, seed=0)


def test_damaged_index_is_named(damaged):
    path = damaged / "shard-000000.index.npz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"shard-000000\.index\.npz is damaged"):
        PackedData(damaged, SEQ, 1, seed=0)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"it has no dataset\.json"):
        PackedData(tmp_path, SEQ, 1, seed=0)
    (tmp_path / "dataset.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        PackedData(tmp_path, SEQ, 1, seed=0)


def test_counts_of_packs_of_shards_that_cannot_be_written_are_kept_in_the_runs_folder(corpus, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shutil.copytree(corpus, shards, ignore=shutil.ignore_patterns(".plans"))
    monkeypatch.setattr("moexpand.data.stream.os.access", lambda place, mode: False)  # root may write everywhere
    PackedData(str(shards), 128, 8, 0, reading=Reading(plans=tmp_path / "run" / "plans")).batch(40)
    assert list((tmp_path / "run" / "plans").glob("packs-*.npy"))
    assert not (shards / ".plans").exists()
