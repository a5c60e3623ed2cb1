"""Each of the odd PDFs that pypdf is tested with, and a picture that unpacks to 600 MB, is read or dropped within its limits."""

import json
import resource
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from moexpand.data.document import COUNTS, DocumentLimits
from moexpand.data.pdf import extract_pdf
from moexpand.data.sandbox import run_jobs
from tests.data.pdf_maker import text

PYPDF = "pypdf==7.1.0"
"""The source distribution has 72 PDFs in resources/: encrypted, rotated, scanned, damaged (BSD-3-Clause)."""
SECONDS = 10.0
"""Of processor time for one file, as long as a neighbour on the machine cannot disturb it."""


def end_of(path: Path, folder: Path) -> tuple[str, float]:
    """What becomes of a document in a process with the limits of a build, and the processor seconds of that process."""
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ((_, failure),) = run_jobs(extract_pdf, [(str(path), str(folder), DocumentLimits())], 1, 60.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    reason = failure or json.loads((folder / COUNTS).read_text())["reason"] or "kept"
    return reason, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_picture_that_unpacks_to_600_megabytes_is_read_or_dropped_within_the_limits(tmp_path: Path) -> None:
    width, height = 20_000, 10_000
    packer = zlib.compressobj(9)
    pixels = b"".join([*(packer.compress(bytes(3 * width * 100)) for _ in range(height // 100)), packer.flush()])
    assert len(pixels) < 1 << 20
    drawn = (
        "q 400 0 0 200 90 500 cm /Bomb Do Q\n"
        + text(90, 480, "Figure 1: A picture that is larger than it looks.")
        + "".join(
            text(90, 440 - 12 * i, "A paragraph of the document that speaks of Figure 1 and of nothing else.") for i in range(6)
        )
    ).encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> /XObject << /Bomb 6 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Times-Roman >>",
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceRGB /BitsPerComponent 8"
        b" /Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (width, height, len(pixels), pixels),
    ]
    # Without a table of objects: PDFium, like every reader, looks for them itself.
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, content) for number, content in enumerate(objects, 1))
    path = tmp_path / "bomb.pdf"
    path.write_bytes(b"%PDF-1.4\n" + body + b"trailer << /Root 1 0 R /Size 7 >>\n%%EOF\n")
    reason, seconds = end_of(path, tmp_path / "out")
    assert reason in ("kept", "memory_limit")
    assert seconds <= SECONDS
    if reason == "kept":
        figures = json.loads((tmp_path / "out" / COUNTS).read_text())["figures"]
        assert figures["input"] == 1


@pytest.mark.extras
def test_every_odd_pdf_of_pypdf_is_read_or_dropped_within_the_limits(tmp_path: Path) -> None:
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "pypdf",
        PYPDF,
        "--dest",
        str(tmp_path),
    ]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("pypdf-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, [member for member in tar.getmembers() if member.name.endswith(".pdf")], filter="data")
    files = sorted(tmp_path.rglob("*.pdf"))
    assert len(files) == 72
    found: Counter[str] = Counter()
    for number, path in enumerate(files):
        reason, seconds = end_of(path, tmp_path / f"out-{number}")
        assert seconds <= SECONDS, (path.name, seconds)
        found[reason] += 1
    assert found.keys() <= {"kept", "no_text", "encrypted", "broken", "no_pages"}, found
    assert found["kept"] >= 45, found
