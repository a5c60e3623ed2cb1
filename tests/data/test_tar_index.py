"""Tars that others wrote are trained on where they lie: nothing is rewritten, extracted, run or lost without a reason."""

import io
import json
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from moexpand.base.errors import EnvironmentFailure, InputError
from moexpand.data import storage
from moexpand.data.images import ImageSettings
from moexpand.data.loader import PackedData
from moexpand.data.stream import Reading
from moexpand.data.tar_index import index_tars
from moexpand.data.tokens import load_tokenizer

SETTINGS = Reading(images=ImageSettings(min_pixels=32 * 32, max_pixels=64 * 64))


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def write_foreign(folder: Path) -> Path:
    """Two tars written by webdataset itself: captions as .txt in one, in .json in the other."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a-000.tar")) as sink:
        for number in range(20):
            sink.write({"__key__": f"a/{number:03d}", "png": png(number), "txt": f"Caption {number} of a picture.", "cls": 3})
    with webdataset.TarWriter(str(folder / "b-000.tar")) as sink:
        for number in range(20):
            sink.write({"__key__": f"b{number:03d}", "jpg": Image.new("RGB", (30, 30)), "json": {"caption": f"Text {number}."}})
    return folder


def index(folder: Path, **options: object) -> dict:
    given = {"tokenizer_name": "qwen-8192", "text_key": "caption", "workers": 1, "max_bad_fraction": 0.0} | options
    return index_tars(folder, say=lambda line: None, **given)


def texts(data: PackedData) -> set[str]:
    """Texts of all training segments, without the tokens of pictures."""
    found = set()
    vision = {data.tokenizer.specials[name] for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")}
    for step in range(-(-data.packs_per_epoch // data.global_batch)):
        for batch in data.batch(step):
            for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                ids = [token for token in batch.tokens[begin:end].tolist() if token not in vision]
                if set(ids) != {data.tokenizer.eos_id}:  # padding
                    found.add(data.tokenizer.decode(ids[:-1]))
    return found


def test_tars_of_webdataset_are_trained_on_where_they_lie(tmp_path):
    folder = write_foreign(tmp_path / "tars")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    summary = index(folder)
    assert (summary["samples"], summary["images"], summary["kinds"]) == (40, 40, {"image": 40})
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    data = PackedData(folder, 256, 4, seed=0, held_out=0.0, reading=SETTINGS)
    wanted = {f"Caption {number} of a picture." for number in range(20)} | {f"Text {number}." for number in range(20)}
    assert wanted <= texts(data)
    assert index(folder) == summary  # again, over itself


def test_the_index_does_not_depend_on_the_number_of_processes(tmp_path):
    one, two = write_foreign(tmp_path / "one"), write_foreign(tmp_path / "two")
    for name in ("a-000.tar", "b-000.tar"):
        (two / name).write_bytes((one / name).read_bytes())
    index(one)
    index(two, workers=2)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        add(tar, "good.png", png(1))
        add(tar, "good.txt", b"A caption.")
        add(tar, "notext.png", png(2))
        add(tar, "latin.txt", "Grüße".encode("latin-1"))
        add(tar, "broken.png", b"\x89PNG\r\n\x1a\n and no more")
        add(tar, "broken.txt", b"A caption.")
        add(tar, "twice.txt", b"One.")
        add(tar, "twice.txt", b"Two.")
        add(tar, "empty.txt", b"  ")
        add(tar, "json.json", b"{not json")
        add(tar, "good.txt", b"The key comes back.")
    with pytest.raises(InputError, match=r"7 of 8 samples in .* cannot be used \(.*no_text 1.*max_bad_fraction=0.0 allows 0"):
        index(folder)
    assert not (folder / "dataset.json").exists()
    summary = index(folder, max_bad_fraction=0.9)
    dropped = summary["stages"]["samples"]["dropped"]
    assert dropped == {
        "no_text": 1, "not_utf8": 1, "image_broken": 1, "member_twice": 1, "empty": 1, "not_json": 1, "scattered_key": 1,
    }  # fmt: skip
    assert summary["samples"] == 1


class Exploding:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_and_names_that_point_elsewhere_do_nothing(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        add(tar, "s1.pyd", pickle.dumps(Exploding(tmp_path / "ran")))
        add(tar, "s1.txt", b"Beside a pickle.")
        add(tar, "../../escape.txt", b"Up and away.")
        add(tar, "/etc/absolute.txt", b"From the root.")
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert index(folder)["samples"] == 3
    assert texts(PackedData(folder, 256, 1, seed=0, held_out=0.0)) == {"Beside a pickle.", "Up and away.", "From the root."}
    files = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("packs-")}
    assert files == {"dataset.json", "x.index.npz", "x.tar"}


@pytest.mark.parametrize("damage", ["header", "cut", "joined"])
def test_a_damaged_tar_is_named_and_never_read_in_part(tmp_path, damage):
    folder = write_foreign(tmp_path / "tars")
    tar = folder / "a-000.tar"
    content = bytearray(tar.read_bytes())
    if damage == "header":
        with tarfile.open(tar) as opened:
            offset = opened.getmembers()[7].offset
        content[offset + 150] ^= 0xFF
    elif damage == "cut":
        content = content[: len(content) // 2]
    else:
        content = content * 2
    tar.write_bytes(content)
    with pytest.raises(InputError, match=r"a-000\.tar (is no tar that can be read to its end|has content behind its end mark)"):
        index(folder)


def test_folders_without_tars_and_our_own_are_refused(tmp_path, corpus):
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no \.tar file, and compressed tars have to be unpacked first"):
        index(tmp_path)
    with pytest.raises(InputError, match="was written by `moexpand data build`"):
        index(corpus)


# ------------------------------------------------------------------ other places


@pytest.fixture
def served(corpus: Path):
    """The corpus behind a real HTTP server that does not know ranges."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(corpus))
    handler.func.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def equal(left: PackedData, right: PackedData) -> bool:
    return all(
        np.array_equal(a.tokens, b.tokens)
        for step in (0, 7, 50)
        for a, b in zip(left.batch(step), right.batch(step), strict=True)
    )


@pytest.mark.parametrize("shuffle", ["samples", "shards"])
def test_shards_at_an_address_give_the_batches_of_the_folder(corpus, tmp_path, shuffle):
    files = fsspec.filesystem("memory")
    for path in corpus.iterdir():
        if path.is_file():
            files.pipe(f"/set-{shuffle}/{path.name}", path.read_bytes())
    options = Reading(shuffle=shuffle)
    local = PackedData(corpus, 128, 8, seed=1, reading=options)
    assert equal(local, PackedData(f"memory://set-{shuffle}", 128, 8, seed=1, reading=options))
    cached = Reading(shuffle=shuffle, cache=tmp_path / "cache", cache_bytes=1 << 30)
    assert equal(local, PackedData(f"memory://set-{shuffle}", 128, 8, seed=1, reading=cached))
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 4


def test_a_web_server_without_ranges_serves_whole_shards_into_a_bounded_cache(corpus, served, tmp_path):
    limit = 2 * max(path.stat().st_size for path in corpus.glob("*.tar")) + 1000
    options = Reading(shuffle="shards", cache=tmp_path / "cache", cache_bytes=limit)
    remote = PackedData(served, 128, 8, seed=1, reading=options)
    assert equal(PackedData(corpus, 128, 8, seed=1, reading=Reading(shuffle="shards")), remote)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= limit


def test_a_place_that_does_not_answer_is_tried_again_and_then_named(corpus, served, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)
    with pytest.raises(InputError, match=r"nowhere is not a folder of shards: it has no dataset\.json"):
        PackedData(f"{served}/nowhere", 128, 8, seed=1)
    with pytest.raises(EnvironmentFailure, match=r"could not be read in 4 attempts"):
        PackedData("http://127.0.0.1:9/set", 128, 8, seed=1)
    with pytest.raises(InputError, match="cannot be read"):
        PackedData("nonsense://set", 128, 8, seed=1)


def test_the_tokenizer_of_an_index_is_checked_for_foreign_tars_too(tmp_path):
    folder = write_foreign(tmp_path / "tars")
    index(folder)
    assert (
        json.loads((folder / "dataset.json").read_text())["tokenizer"]["fingerprint"] == load_tokenizer("qwen-8192").fingerprint
    )
    with pytest.raises(InputError, match="were indexed with the tokenizer qwen-8192"):
        PackedData(folder, 256, 1, seed=0, tokenizer="qwen")
