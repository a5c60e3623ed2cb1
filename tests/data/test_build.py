"""A build gives the same bytes whatever the number of processes, loses nothing without a reason, and leaves no half folder."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from moexpand.base.errors import InputError
from moexpand.data.build import BuildOptions, build_dataset
from moexpand.data.index import index_name, parse_index
from moexpand.data.inspect import inspect_shards
from moexpand.data.measures import repetition, symbol_ratio
from moexpand.data.sources import cut, list_sources, paragraphs
from moexpand.data.tokens import load_tokenizer
from moexpand.data.units import ReadOptions
from tests.data.conftest import write_jsonl
from tests.data.pdf_maker import paragraph, plot, text, write_pdf

LINES = [
    "The quick brown fox jumps over the lazy dog while Figure 1 shows",
    "that the dog does not mind, and the fox is not as quick as it was",
    "when this text was set for the first time by a printer in a hurry.",
]


def silent(line: str) -> None:
    """Takes progress and says nothing."""


def build(out: Path, pdfs: Path | None, sources: list[Path], **options: object) -> dict:
    chosen = BuildOptions(ReadOptions(tokenizer="qwen-8192"), **({"workers": 1} | options))
    return build_dataset(str(pdfs) if pdfs else None, [str(source) for source in sources], out, chosen, silent)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of three PDFs (one broken), and one of a jsonl and a text file."""
    pdfs, texts = tmp_path / "pdfs", tmp_path / "texts"
    pdfs.mkdir()
    texts.mkdir()
    caption = text(200, 440, "Figure 1: A zigzag in a frame.")
    for name in ("first", "second"):
        body = text(72, 800, f"In the {name} document") + paragraph(72, 760, LINES * 3) + plot(150, 460, 300, 150)
        write_pdf(pdfs / f"{name}.pdf", [body + caption + paragraph(72, 400, LINES * 4)])
    (pdfs / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    write_jsonl(texts / "documents.jsonl", 30)
    (texts / "notes.md").write_text("# Notes\n\n" + "\n\n".join(f"Paragraph {i} says something of its own." for i in range(40)))
    return pdfs, texts


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_the_number_of_processes_or_the_time(sources, tmp_path):
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        build(tmp_path / name, sources[0], [sources[1]], workers=workers, shard_samples=8)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "again")
    assert len(list((tmp_path / "one").glob("*.tar"))) > 3


def test_every_document_and_sample_ends_in_a_shard_or_under_a_reason(tmp_path):
    long = "A sentence that is long enough to pass the filters, and it goes on for quite some time until it ends here. " * 3
    records = [
        {"text": long},
        {"text": long.replace(" ", "  ")},
        {"text": "short"},
        {"text": "1+1=2; " * 60},
        {"text": "The same line again and again.\n" * 30},
        {"other": "no text"},
        {"text": ""},
    ]
    lines = [json.dumps(record) for record in records] + ["{not json", "[1, 2]", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe ".encode("latin-1") * 50)
    summary = build(tmp_path / "out", None, [tmp_path / "a.jsonl", tmp_path / "latin.txt"])
    stages = summary["stages"]
    dropped = {"empty": 1, "no_text_key": 1, "not_json": 1, "not_object": 1, "not_utf8": 1}
    assert stages["documents"] == {"input": 10, "kept": 5, "dropped": dropped}
    assert stages["samples"]["dropped"] == {"duplicate": 1, "repetition": 1, "symbols": 1, "too_short": 1}
    assert stages["samples"]["kept"] == summary["samples"] == 1
    for stage in stages.values():
        assert stage["input"] == stage["kept"] + sum(stage["dropped"].values())


def test_pdfs_give_text_and_figures_and_broken_ones_are_counted(sources, tmp_path):
    summary = build(tmp_path / "out", sources[0], [])
    assert summary["stages"]["documents"] == {"input": 3, "kept": 2, "dropped": {"broken": 1}}
    assert summary["stages"]["figures"] == {"input": 2, "kept": 2, "dropped": {}}
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    figures = [sample for sample in samples if "png" in sample]
    assert len(figures) == 1  # the second figure is the same picture with the same text
    # The body repeats itself, and so does the other document.
    assert summary["stages"]["samples"]["dropped"] == {"duplicate": 1, "ngram_repetition": 2}
    meta = json.loads(figures[0]["json"])
    assert meta["caption"] == "Figure 1: A zigzag in a frame."
    assert (meta["kind"], meta["page"], meta["source"]) == ("figure", 1, "pdfs/first.pdf")
    assert figures[0]["txt"].decode().startswith(meta["caption"] + "\n\n")
    assert "Figure 1 shows that the dog does not mind" in figures[0]["txt"].decode()
    width, height = Image.open(io.BytesIO(figures[0]["png"])).size
    assert (width, height) == pytest.approx((2 * 302, 2 * 152), abs=20)


def test_webdataset_reads_what_the_index_says(corpus):
    tokenizer = load_tokenizer("qwen-8192")
    for path in sorted(corpus.glob("*.tar")):
        index = parse_index(path.with_name(index_name(path.name)).read_bytes(), path.name, str(path))
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [key.decode() for key in index.key]
        assert [len(tokenizer.encode(sample["txt"].decode())) for sample in samples] == index.tokens.tolist()
        assert all(json.loads(sample["json"])["kind"] == "text" for sample in samples)


def test_tar_members_carry_no_time_owner_or_unsafe_name(sources, tmp_path):
    build(tmp_path / "out", sources[0], [sources[1]])
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) for m in members} == {(0, 0, 0, "", "", True)}
    assert all(m.name.count(".") == 1 and "/" not in m.name and m.name.isascii() for m in members)


def test_nothing_left_is_an_error_and_leaves_no_folder(tmp_path):
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(InputError, match=r"No sample is left of 1 files \(dropped: too_short 1\)"):
        build(tmp_path / "out", None, [tmp_path / "a.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_wrong_sources_and_targets_are_refused(tmp_path, corpus):
    with pytest.raises(InputError, match="There is nothing to read: neither pdfs nor sources is given"):
        build(tmp_path / "out", None, [])
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        build(tmp_path / "out", tmp_path / "nowhere", [])
    source = write_jsonl(tmp_path / "a.jsonl", 3)
    with pytest.raises(InputError, match="exists already"):
        build(corpus, None, [source])
    with pytest.raises(InputError, match="shard_samples is 0"):
        build(tmp_path / "out", None, [source], shard_samples=0)


def test_sources_of_one_name_keep_their_own_keys(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent / "texts").mkdir(parents=True)
        write_jsonl(tmp_path / parent / "texts" / "a.jsonl", 4, seed=ord(parent))
    files = list_sources(None, [str(tmp_path / "x" / "texts"), str(tmp_path / "y" / "texts")])
    assert [file.name for file in files] == ["texts/a.jsonl", "texts/a.jsonl#2"]
    assert len({file.key for file in files}) == 2


def test_inspect_counts_what_the_shards_hold(sources, tmp_path):
    summary = build(tmp_path / "out", sources[0], [sources[1]], shard_samples=8)
    found = inspect_shards(tmp_path / "out")
    assert found["samples"] == summary["samples"] == sum(kind["samples"] for kind in found["kinds"].values())
    assert found["tokens"] == summary["tokens"] == sum(kind["tokens"] for kind in found["kinds"].values())
    assert {name: kind["samples"] for name, kind in found["kinds"].items()} == summary["kinds"]
    assert {example["kind"] for example in found["examples"]} == {"figure", "text"}
    assert all(0 < fill <= 1 for fill in found["fill"].values())


def test_texts_are_cut_at_paragraphs_and_nothing_is_lost():
    pieces = [f"Paragraph {i}. " + "word " * (i % 17) for i in range(200)]
    texts = cut(pieces, 300)
    assert "\n\n".join(texts).split() == "\n\n".join(pieces).split()
    assert all(300 <= len(text) < 300 + 100 + 300 // 8 for text in texts[:-1])
    long = cut(["x" * 1000 + " " + "y" * 500], 300)
    assert "".join(long).replace(" ", "") == "x" * 1000 + "y" * 500
    assert max(map(len, long)) <= 600


def test_paragraphs_keep_the_indent_of_a_listing():
    assert paragraphs("One.\n\n    def f():\n        return 1\n\n\nTwo\nlines.\n") == [
        "One.",
        "    def f():\n        return 1",
        "Two\nlines.",
    ]


def test_filters_measure_what_they_say():
    assert symbol_ratio("ab 12") == pytest.approx(0.4)
    assert symbol_ratio("图 ab") == 0.0
    assert repetition("same\nsame\nother\n") == pytest.approx(4 / 13)
    assert repetition("") == 0.0
