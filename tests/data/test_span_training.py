"""The pieces that ship are those that their notice describes, and training gives the same bytes again."""

import gzip
from pathlib import Path

import pytest

from moexpand.base.errors import InputError
from moexpand.base.files import sha256
from moexpand.data import span_training
from moexpand.data.science_tokenizer import DOMAINS, MODELS
from moexpand.data.span_training import ALPHABETS, SOURCES, Source, column, fasta, fetch, split, train
from moexpand.data.spans import Domain
from tests.data.sequences import PROTEINS


def test_the_notice_names_every_model_by_its_bytes_and_every_package() -> None:
    notice = (MODELS / "NOTICE.md").read_text()
    assert {file.stem for file in MODELS.glob("*.model")} == set(DOMAINS) == set(ALPHABETS)
    for name in DOMAINS:
        assert sha256(MODELS / f"{name}.model") in notice
    for source in SOURCES:
        package, _, version = source.package.partition("==")
        assert f"| {source.domain} | {package} {version}" in notice
        assert Path(source.path).name in notice


def test_training_is_deterministic_and_covers_the_alphabet() -> None:
    model = train(PROTEINS, ALPHABETS["PROT"], pieces=60)
    assert train(PROTEINS, ALPHABETS["PROT"], pieces=60) == model
    domain = Domain("PROT", model, 0, "here")
    assert len(domain.ids) == 60
    assert domain.decode(domain.encode(ALPHABETS["PROT"]) or []) == ALPHABETS["PROT"]


def test_sequences_are_read_once_in_order_and_within_their_alphabet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unpacked(package: str, where: Path, options: list[str]) -> bool:
        (where / "root").mkdir(parents=True)
        data = b">a b\nACGT\nacgt\n>c\nNNN!\n>d\nACGTACGT\n>e\nGG\n"
        (where / "root" / "x.fa.gz").write_bytes(gzip.compress(data))
        return True

    monkeypatch.setattr(span_training, "download", unpacked)
    monkeypatch.setattr(span_training, "SOURCES", (Source("XNA", "some-package", "x.fa.gz", fasta),))
    assert fetch(tmp_path / "one", lambda line: None)["XNA"] == ["ACGTACGT", "GG"]
    monkeypatch.setattr(span_training, "SOURCES", (Source("XNA", "some-package", "gone.fa", fasta),))
    with pytest.raises(InputError, match=r"^The package some-package holds no gone\.fa; its version may have moved it\.$"):
        fetch(tmp_path / "two", lambda line: None)


def test_a_package_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(span_training, "download", lambda package, where, options: False)
    monkeypatch.setattr(span_training, "private_lists", lambda folder: [])
    monkeypatch.setattr(span_training, "SOURCES", (Source("XNA", "some-package", "x.fa", fasta),))
    with pytest.raises(InputError, match="apt-get cannot download some-package"):
        fetch(tmp_path, lambda line: None)


def test_columns_and_held_out_lines() -> None:
    assert list(column(0, ",")('"C1,2",a\nCCO,b\n')) == ["C1,2", "CCO"]
    assert list(column(1, "\t")('x\tC"\ny\tCC\nz\n')) == ['C"', "CC"]
    kept, held_out = split([f"{number}" for number in range(2000)])
    assert len(kept) + len(held_out) == 2000
    assert 60 < len(held_out) < 140
