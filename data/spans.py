"""Spans of SMILES, proteins and nucleic acids in vocabularies of their own, beside a base tokenizer for everything else.

A span is chosen by tags in the text, `<SMILES>CC(=O)O</SMILES>`, and becomes the opening tag's id, the ids of the domain's
SentencePiece model with the domain's offset added, and the closing tag's id, as in Intern-S1, where tags are tokens. Nothing is
detected without tags. Where the domain cannot write the whole inside (other characters, white space, nothing at all), or a tag is
not closed, tags and inside are plain text of the base tokenizer; so decoding always undoes encoding.

A tag's id therefore always announces ids of its domain, and tags are no markup: `specials` does not name them.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from moexpand.base.errors import InputError
from moexpand.data.fingerprint import PROBE, fingerprint

TAGS = {"SMILES": "SMILES", "protein": "PROT", "dna": "XNA", "rna": "XNA"}
"""Name of a tag -> the domain that its inside is written in."""
SPAN_PROBE = (
    "<SMILES>CN1C=NC2=C1C(=O)N(C(=O)N2C)C</SMILES><protein>MKWVTFISLLFLFSSAYSRGVFRRDAHKSEVAHRF</protein>"
    "<dna>GAGTTTTATCGCTTCCATGACGCAGAAGTTAACACT</dna><rna>GGCCUUAAn</rna>"
)
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""
_OFFSET = re.compile(r"sp_model_(\w+)\.offset\s*=\s*(\d+)")


class Base(Protocol):
    """What the tokenizer of the text around spans must have; see `tokens.Tokenizer`."""

    name: str
    vocab_size: int
    eos_id: int
    specials: dict[str, int]
    stripping: frozenset[str]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token, special and added ones among them -> id."""

    def normalize(self, text: str) -> str:
        """`text` as `encode` reads it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class Domain:
    """One domain's pieces: a SentencePiece model whose ids begin at an offset.

    Args:
        name: such as SMILES.
        content: bytes of the model.
        offset: id of its first piece.
        origin: where the model comes from, for messages.

    Raises:
        InputError: the bytes are no SentencePiece model, or the package sentencepiece is missing.
    """

    def __init__(self, name: str, content: bytes, offset: int, origin: str) -> None:
        self.name = name
        self.content = content
        self.offset = offset
        self.origin = origin
        self._processor = _sentencepiece().SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            raise InputError(f"{origin} is not a SentencePiece model, or is damaged; copy it anew.") from None
        self.ids = range(offset, offset + self._processor.get_piece_size())
        self._names: list[str] = [self._processor.id_to_piece(place) for place in range(len(self.ids))]
        control = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        self._texts = [
            self.token(place) if any(kind(place) for kind in control) else piece.replace(WORD_START, " ")
            for place, piece in enumerate(self._names)
        ]

    def token(self, place: int) -> str:
        """How files name piece number `place`."""
        return f"<|{self.name}_{self._names[place]}|>"

    def encode(self, text: str) -> list[int] | None:
        """Ids of `text`, the offset added; None when the pieces cannot write it."""
        places: list[int] = self._processor.encode(text)
        written = "".join([self._texts[place] for place in places])
        return [self.offset + place for place in places] if written == text else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids of this domain; pieces that stand for no text appear by name."""
        return "".join([self._texts[number - self.offset] for number in ids])


class SpanTokenizer:
    """A base tokenizer, and domains for what stands between tags. A `tokens.Tokenizer`.

    Args:
        base: its vocabulary holds the tags.
        domains: in order of offset.
        name: the base's if not given.
        vocab_size: rows of the embedding if more than the ids need.

    Raises:
        InputError: ids of two vocabularies overlap.
    """

    def __init__(self, base: Base, domains: Sequence[Domain], name: str | None = None, vocab_size: int = 0) -> None:
        self.name = name or base.name
        self.domains = tuple(domains)
        self._base = base
        _check_apart(base, self.domains)
        self.vocab_size = max(vocab_size, base.vocab_size, *(domain.ids.stop for domain in self.domains))
        self.eos_id = base.eos_id
        by_name = {domain.name: domain for domain in self.domains}
        self._tags = {
            tag: (base.specials[f"<{tag}>"], by_name[domain], base.specials[f"</{tag}>"])
            for tag, domain in TAGS.items()
            if domain in by_name and f"<{tag}>" in base.specials and f"</{tag}>" in base.specials
        }
        of_tags = {name for tag in self._tags for name in (f"<{tag}>", f"</{tag}>")}
        self.specials = {token: number for token, number in base.specials.items() if token not in of_tags}
        self.stripping = base.stripping - of_tags
        # No `<` and no white space inside: an unclosed tag ends at the next one, so that long texts take linear time.
        self._span = re.compile(rf"<({'|'.join(self._tags)})>([^<\s]+)</\1>" if self._tags else r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: spans in their domains, the rest by the base."""
        text = self._base.normalize(text)
        ids: list[int] = []
        end = 0
        for match in self._span.finditer(text):
            first, domain, last = self._tags[match[1]]
            inside = domain.encode(match[2])
            if inside is not None:
                ids += [*self._base.encode(text[end : match.start()]), first, *inside, last]
                end = match.end()
        return ids + self._base.encode(text[end:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; tags and special tokens appear by name."""
        runs = groupby(ids, key=self._domain_of)
        return "".join([(domain or self._base).decode(run) for domain, run in runs])

    def _domain_of(self, number: int) -> Domain | None:
        return next((domain for domain in self.domains if number in domain.ids), None)

    @cached_property
    def fingerprint(self) -> str:
        """See `tokens.Tokenizer.fingerprint`; the bytes of the domains' models are part of it."""
        pieces = {domain.token(place): number for domain in self.domains for place, number in enumerate(domain.ids)}
        ids = self.encode(PROBE + SPAN_PROBE)
        return fingerprint(self._base.vocabulary | pieces, ids, [domain.content for domain in self.domains])

    def save(self, folder: Path) -> None:
        """See `tokens.Tokenizer.save`; the domains' models stand beside the base's files."""
        self._base.save(folder)
        for domain in self.domains:
            (Path(folder) / f"tokenizer_{domain.name}.model").write_bytes(domain.content)


def model_files(folder: Path) -> list[Path]:
    """The domains' models in a tokenizer's folder."""
    return sorted(folder.glob("tokenizer_*.model"))


def domains_of(folder: Path) -> list[Domain]:
    """The domains of a folder, in order of offset. Offsets are read from the text of its Python files, which is not run.

    Raises:
        InputError: a model is damaged, or no file says where its ids begin.
    """
    code = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py")))
    offsets = {domain: int(offset) for domain, offset in _OFFSET.findall(code)}
    domains = []
    for file in model_files(folder):
        name = file.stem.removeprefix("tokenizer_")
        if name not in offsets:
            raise InputError(
                f"{file} has ids of its own, and no Python file beside it says where they begin; "
                f"copy the tokenizer's tokenization_*.py with the line sp_model_{name}.offset = ... into the folder."
            )
        domains.append(Domain(name, file.read_bytes(), offsets[name], str(file)))
    return sorted(domains, key=lambda domain: domain.offset)


def _check_apart(base: Base, domains: Sequence[Domain]) -> None:
    owners = {number: (token, base.name) for token, number in base.vocabulary.items()}
    for domain in domains:
        for place, number in enumerate(domain.ids):
            if number in owners:
                token, where = owners[number]
                raise InputError(
                    f"Id {number} is {token!r} of {where} and {domain.token(place)!r} of {domain.origin}: these files do not "
                    "belong to one tokenizer, or an offset in its Python code is wrong; copy the folder anew."
                )
            owners[number] = (domain.token(place), domain.origin)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise InputError(
            "This tokenizer has SentencePiece models, and the package sentencepiece is not installed; "
            "run `pip install sentencepiece`."
        ) from None
    return sentencepiece
