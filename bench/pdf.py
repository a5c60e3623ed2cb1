"""Extraction of PDFs: pages a second of ours against the plain text of pdfplumber and of pdfminer.six, which many use.

Ours reads text, drawings and layout, finds figures and tables, renders and writes them at 144 dpi, and writes the records; the
others only give the text of every page. One process, one core; programs take turns on every document, the first round warms up;
times are of the processor, so that neighbours on the machine count less. Prints versions, and medians with minimum and maximum.

    python bench/pdf.py [rounds=3] [PDF or folder of PDFs ...]

Without arguments: two sample documents of the repository, in about four minutes. pdfplumber and pdfminer.six are no dependencies
of this project: `pip install pdfplumber` into the environment that runs this brings both.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ("hcl-colors.pdf", "libtommath.pdf")
OURS = "ours, all"
Run = Callable[[Path], object]


def ours(path: Path) -> None:
    """Text, figures and tables of a PDF into a folder that is thrown away."""
    from moexpand.data.pdf import DocumentLimits, extract_pdf

    with tempfile.TemporaryDirectory() as folder:
        extract_pdf(str(path), folder, DocumentLimits())


def with_pdfplumber(path: Path) -> int:
    """Text of a PDF by pdfplumber."""
    import pdfplumber

    with pdfplumber.open(path) as pdf:
        length = 0
        for page in pdf.pages:
            length += len(page.extract_text())
            # Its pages keep every character otherwise.
            page.close()
        return length


def with_pdfminer(path: Path) -> int:
    """Text of a PDF by pdfminer.six."""
    from pdfminer.high_level import extract_text

    return len(extract_text(path))


def page_count(path: Path) -> int:
    """Pages of a PDF."""
    import pypdfium2

    with pypdfium2.PdfDocument(path) as document:
        return len(document)


def measure(paths: list[Path], runs: dict[str, Run], rounds: int) -> dict[str, dict[Path, list[float]]]:
    """Processor seconds by program and document, one for each round."""
    seconds: dict[str, dict[Path, list[float]]] = {name: {path: [] for path in paths} for name in runs}
    for number in range(rounds + 1):
        for path in paths if number else paths[:1]:
            for name, run in runs.items():
                began = time.process_time()
                run(path)
                if number:
                    seconds[name][path].append(time.process_time() - began)
    return seconds


def report(pages: int, measured: list[float]) -> str:
    """Pages a second: median, slowest and fastest round."""
    return f"{pages / statistics.median(measured):8.1f} ({pages / max(measured):.1f} to {pages / min(measured):.1f})"


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    rounds = 3
    given: list[Path] = []
    for argument in arguments:
        if argument.startswith("rounds="):
            rounds = int(argument.removeprefix("rounds="))
        else:
            given.append(Path(argument))
    try:
        versions = [f"{name} {version(name)}" for name in ("pypdfium2", "pdfplumber", "pdfminer.six", "numpy", "pillow")]
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed; `pip install pdfplumber` brings it and pdfminer.six for this measurement.")
    paths = [one for path in given for one in (sorted(path.glob("*.pdf")) if path.is_dir() else [path])]
    paths = paths or [ROOT / "data" / "samples" / name for name in SAMPLES]
    sys.path.insert(0, str(ROOT))
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}; {rounds} rounds; pages a second of processor time")
    runs: dict[str, Run] = {OURS: ours, "pdfplumber, text": with_pdfplumber, "pdfminer.six, text": with_pdfminer}
    seconds = measure(paths, runs, rounds)
    counts = {path: page_count(path) for path in paths}
    for path in paths:
        print(f"{path.name}, {counts[path]} pages")
        for name in runs:
            print(f"    {name:20}{report(counts[path], seconds[name][path])}")
    total = sum(counts.values())
    sums = {name: [sum(times) for times in zip(*seconds[name].values(), strict=True)] for name in runs}
    print(f"all, {total} pages")
    for name in runs:
        times = statistics.median(sums[name]) / statistics.median(sums[OURS])
        print(f"    {name:20}{report(total, sums[name])}" + ("" if name == OURS else f"   {times:.1f} times our time"))


if __name__ == "__main__":
    main(sys.argv[1:])
