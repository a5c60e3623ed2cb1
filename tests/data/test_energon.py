"""megatron-energon reads our shards, and we read what it has prepared."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from moexpand.data.loader import PackedData
from moexpand.data.shards import Sample
from moexpand.data.stream import Reading
from moexpand.data.tar_index import index_tars
from tests.commands import ROOT
from tests.data.test_multimodal import IMAGES, epoch, picture, pieces, words, write_set

READ = """
import json, sys
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
config = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_val_dataset(sys.argv[1], split_part="train", batch_size=1, worker_config=config)
found = [[batch.__key__[0], batch.caption[0], list(batch.image[0].shape)] for batch in get_loader(dataset)]
json.dump(found, open(sys.argv[2], "w"))
"""
pytestmark = pytest.mark.extras


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def energon() -> Path:
    """The folder of energon's commands."""
    run(str(ROOT / ".ci" / "energon"))
    return ROOT / ".venv" / "energon" / "bin"


@pytest.fixture(scope="module")
def prepared(energon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our shards of 40 captioned pictures, with energon's files beside them."""
    folder = tmp_path_factory.mktemp("energon")
    samples = []
    for number in range(40):
        image = picture(folder / f"{number}.png", 40 + number, 50, number)
        samples.append(
            Sample(f"figure-{number:02d}", "figure", [{"image": "png"}, {"text": words(number, 8)}], {}, {"png": image})
        )
    shards = write_set(folder / "shards", samples)
    fields = json.dumps({"image": "png", "caption": "txt"})
    run(
        str(energon / "energon"), "prepare", str(shards), "--non-interactive", "--split-ratio", "1,0,0", "--num-workers", "1",
        "--sample-type", "CaptioningSample", "--field-map", fields,
    )  # fmt: skip
    return shards


def test_energon_reads_every_sample_of_our_shards(energon: Path, prepared: Path, tmp_path: Path) -> None:
    run(str(energon / "python"), "-c", READ, str(prepared), str(tmp_path / "found.json"))
    found = {key: (caption, shape) for key, caption, shape in json.loads((tmp_path / "found.json").read_text())}
    assert len(found) == 40
    for path in sorted(prepared.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, ending = member.name.split(".", 1)
                content = tar.extractfile(member)
                if ending == "txt":
                    assert found[key][0] == content.read().decode()
                elif ending == "png":
                    image = Image.open(content)
                    assert found[key][1] == [3, image.height, image.width]


def test_we_train_on_what_energon_has_prepared(prepared: Path, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(prepared, tmp_path / "theirs"))
    for path in [theirs / "dataset.json", *theirs.glob("*.npz")]:
        path.unlink()
    assert (theirs / ".nv-meta").is_dir()
    index_tars(theirs, "qwen-8192", "text", workers=1, max_bad_fraction=0.0, say=lambda line: None)
    options = Reading(images=IMAGES)
    ours, indexed = (PackedData(place, 256, 1, seed=1, held_out=0.0, reading=options) for place in (prepared, theirs))
    assert pieces(epoch(indexed)) == pieces(epoch(ours))
