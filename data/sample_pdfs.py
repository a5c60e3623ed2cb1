"""Real PDFs with figures to try the program on: fetched with the system's package tools, or the samples in the repository.

Vignettes of R packages and the Octave manual are science and engineering documents that any Debian or Ubuntu machine can
fetch; they are under licences (mostly the GPL) that keep them out of this repository. Nothing is installed, and no rights are
needed: packages are downloaded into a temporary folder and unpacked there.
"""

import gzip
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moexpand.base.files import new_folder
from moexpand.data.debian import download, private_lists, run

PACKAGES = (
    "octave-doc",
    "r-cran-vcd",
    "r-cran-lme4",
    "r-cran-spacetime",
    "r-cran-desolve",
    "r-cran-vegan",
    "r-cran-seriation",
    "r-cran-surveillance",
    "r-cran-gstat",
    "r-cran-partykit",
    "r-cran-flexmix",
    "r-cran-survival",
)
ENOUGH_PACKAGES = 6
"""With fewer than these the samples of the repository are added."""
TOTAL_SECONDS = 240.0
MIN_BYTES = 30_000
"""Smaller PDFs in packages are single plots."""
SAMPLES = Path(__file__).parent / "samples"


def fetch_pdfs(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Fill a folder with PDFs; one that holds some already is left as it is.

    Args:
        folder: to create.
        say: takes one line of progress at a time.

    Returns:
        The PDFs in the folder, sorted.
    """
    folder = Path(folder)
    there = sorted(folder.glob("*.pdf"))
    if there:
        return there
    with new_folder(folder) as building:
        fetched = _fetch_packages(building, say)
        if fetched < ENOUGH_PACKAGES:
            say(f"{fetched} of {len(PACKAGES)} packages could be fetched; the sample documents of the repository are added")
            for sample in sorted(SAMPLES.glob("*.pdf")):
                shutil.copyfile(sample, building / sample.name)
    return sorted(folder.glob("*.pdf"))


def fetch_documents(folder: Path, documents: Sequence[tuple[str | None, str]], say: Callable[[str], None]) -> list[Path]:
    """Add single documents to a folder, each under its own file name, in place of an older one of that name.

    Args:
        folder: created where it is missing.
        documents: (package, path in the package) of each; without a package the path's last part names a sample of this
            repository. A path that ends in .gz is unpacked.
        say: takes one line of progress at a time.

    Returns:
        The files written. Documents that could not be had are told of and left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory() as scratch:
        options: list[str] | None = None
        for i, package in enumerate(sorted({package or "" for package, _ in documents})):
            where = Path(scratch) / str(i)
            where.mkdir()
            if package and not download(package, where, options or []) and options is None:
                options = private_lists(Path(scratch) / "apt")
                download(package, where, options)
            for path in [path for owner, path in documents if (owner or "") == package]:
                source = where / "root" / path if package else SAMPLES / Path(path).name
                if not source.is_file():
                    say(f"{package or 'samples'}: {path} is not available")
                    continue
                data = source.read_bytes()
                target = folder / source.name.removesuffix(".gz")
                target.write_bytes(gzip.decompress(data) if source.suffix == ".gz" else data)
                written.append(target)
    return written


def _fetch_packages(folder: Path, say: Callable[[str], None]) -> int:
    """Download and unpack packages and copy their PDFs; returns how many packages gave some."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        say("this system has no apt-get and dpkg")
        return 0
    deadline = time.monotonic() + TOTAL_SECONDS
    options: list[str] = []
    fetched = 0
    with tempfile.TemporaryDirectory() as scratch:
        for i, package in enumerate(PACKAGES):
            if time.monotonic() > deadline:
                say("the time for fetching is over")
                break
            where = Path(scratch) / package
            where.mkdir()
            done = download(package, where, options)
            if not done and i == 0:
                options = private_lists(Path(scratch) / "apt")
                done = download(package, where, options)
                if not done and not _knows_any(options):
                    say("apt-get cannot reach a package archive")
                    return 0
            count = _copy_pdfs(where, folder) if done else 0
            say(f"{package}: {f'{count} PDFs' if done else 'not available'}")
            fetched += count > 0
    return fetched


def _knows_any(options: list[str]) -> bool:
    """Whether the package lists know one of the other packages."""
    return any(run(["apt-cache", *options, "show", package], None, 10.0) for package in PACKAGES[1:3])


def _copy_pdfs(root: Path, folder: Path) -> int:
    found = [path for path in sorted(root.rglob("*.pdf")) if "doc" in path.parts and path.stat().st_size >= MIN_BYTES]
    # The reference card comes in three paper sizes with one text.
    found = [path for path in found if not path.stem.startswith("refcard")]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return len(found)


if __name__ == "__main__":
    fetch_pdfs(Path(sys.argv[1]), print)
