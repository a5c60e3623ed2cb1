"""What each token id stands for, read from a tokenizer's files alone: no torch, and no code of the checkpoint is run.

Read, later ones first where they disagree: `tokenizer.json` (its model's vocabulary, then its added tokens) or else `vocab.json`;
`added_tokens.json`; `added_tokens_decoder` of `tokenizer_config.json`. Beside these, Intern-S1 and its kin keep vocabularies for
single domains (molecules, proteins) in SentencePiece files `tokenizer_DOMAIN.model`, whose first id only the folder's Python code
knows; that number is read from its text, where it says `sp_model_DOMAIN.offset = 151694`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import read_json

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""

NORMAL, USER_DEFINED, BYTE = 1, 4, 6
"""Kinds of SentencePiece pieces that stand for text; the others are unknown, control and unused ones."""

PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.*", "additional_chat_templates/*", "tokenizer.model", "tokenizer_*.model", "tokenization_*.py",
    "generation_config.json",
)  # fmt: skip
"""Files of a checkpoint folder that make up its tokenizer, or name its tokens by their ids."""

Splitter = Callable[[list[str]], list[tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Token:
    """One id's token.

    Attributes:
        name: as the files write it.
        content: the bytes that it stands for; empty for control pieces.
        domain: the vocabulary that it belongs to; empty for the main one.
    """

    name: str
    content: bytes
    domain: str = ""

    @property
    def meaning(self) -> tuple[str, bytes]:
        """Equal for tokens that mean the same, in whatever tokenizer."""
        return self.domain, self.content or self.name.encode()

    @property
    def text(self) -> str:
        """Empty when it stands for no text, or for a part of a character."""
        try:
            return self.content.decode()
        except UnicodeDecodeError:
            return ""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its tokenizer or name its tokens, relative to it."""
    return sorted({path.relative_to(folder) for pattern in PATTERNS for path in Path(folder).glob(pattern) if path.is_file()})


def read_tokens(folder: Path) -> dict[int, Token]:
    """Token of every id of the tokenizer in `folder`.

    Raises:
        InputError: there is no tokenizer that can be read, a file is damaged, or it is not known where a domain's ids begin.
    """
    folder = Path(folder)
    tokens = dict(_main_tokens(folder))
    for number, content in _added_tokens(folder):
        tokens[number] = Token(content, content.encode())
    for number, token in _domain_tokens(folder):
        if number in tokens:
            raise InputError(
                f"{folder} gives id {number} to both {tokens[number].name!r} and {token.name!r}; "
                "give the rows to move with vocab_map."
            )
        tokens[number] = token
    return tokens


def splitter(folder: Path) -> Splitter | None:
    """How the tokenizer in `folder` splits texts: ids of the pieces, none for a text that it cannot split.

    By `tokenizer.json`, or by `vocab.json` and `merges.txt` with GPT-2's words; None without them.
    """
    import tokenizers

    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer = tokenizers.Tokenizer(model)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            return None
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"The tokenizer in {folder} cannot be loaded: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)

    def split(texts: list[str]) -> list[tuple[int, ...]]:
        found = (tuple(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
        return [() if unknown_id in ids else ids for ids in found]

    return split


# ---------------------------------------------------------------- the main vocabulary


def _main_tokens(folder: Path) -> Iterator[tuple[int, Token]]:
    """The model's own tokens; the decoder tells whether their names spell bytes (GPT-2) or text."""
    file = next((folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"{folder} has no tokenizer.json and no vocab.json, so that the meaning of its token ids is unknown; "
            "name a tokenizer's folder, or give the rows to move with vocab_map."
        )
    content = read_json(file)
    try:
        whole = file.name == "tokenizer.json"
        vocabulary = content["model"]["vocab"] if whole else content
        if isinstance(vocabulary, list):  # Unigram: pairs of piece and score, in order of id
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        if not vocabulary or not all(type(number) is int and number >= 0 for number in vocabulary.values()):
            raise ValueError("ids are not whole numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} holds no vocabulary of tokens and their ids ({error!r}); use vocab_map.") from error
    byte_level = not whole or _mentions([content.get("pre_tokenizer"), content.get("decoder")], "ByteLevel")
    decode = _byte_level_content if byte_level else _word_piece_content
    for name, number in vocabulary.items():
        yield number, Token(name, decode(name))


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    files = {name: folder / name for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")}
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    try:
        for token in found.get("tokenizer.json", {}).get("added_tokens") or ():
            yield int(token["id"]), str(token["content"])
        for content, number in found.get("added_tokens.json", {}).items():
            yield int(number), str(content)
        for number, token in (found.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}).items():
            yield int(number), str(token["content"] if isinstance(token, dict) else token)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The added tokens of the tokenizer in {folder} are not pairs of id and content ({error!r}).") from error


def _mentions(value: Any, kind: str) -> bool:
    """Whether a part of a tokenizer.json is of this type, or holds one that is."""
    if isinstance(value, dict):
        return value.get("type") == kind or any(_mentions(part, kind) for part in value.values())
    return isinstance(value, list) and any(_mentions(part, kind) for part in value)


def _byte_names() -> dict[str, int]:
    """The byte behind each character of byte-level vocabularies (GPT-2): itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_names()


def _byte_level_content(name: str) -> bytes:
    return bytes(BYTES[character] for character in name) if all(character in BYTES for character in name) else name.encode()


def _word_piece_content(name: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace(WORD_START, " ").encode()


# ---------------------------------------------------------------- domains


def _domain_tokens(folder: Path) -> Iterator[tuple[int, Token]]:
    files = sorted(folder.glob("tokenizer_*.model"))
    code = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py"))) if files else ""
    offsets = {domain: int(offset) for domain, offset in re.findall(r"sp_model_(\w+)\.offset\s*=\s*(\d+)", code)}
    for file in files:
        domain = file.stem.removeprefix("tokenizer_")
        if domain not in offsets:
            raise InputError(
                f"{file} has ids of its own, and no Python file beside it says where they begin "
                f"(sp_model_{domain}.offset = ...); give the rows to move with vocab_map."
            )
        for place, (piece, kind) in enumerate(_pieces(file)):
            content = _word_piece_content(piece) if kind in (NORMAL, USER_DEFINED, BYTE) else b""
            yield offsets[domain] + place, Token(f"<|{domain}_{piece}|>", content, domain)


def _pieces(file: Path) -> list[tuple[str, int]]:
    """Text and kind of every piece of a SentencePiece model, in order of id.

    The file is a protocol buffer: ModelProto has repeated SentencePiece pieces = 1, SentencePiece has string piece = 1 and
    Type type = 3 with NORMAL as its default (google/sentencepiece, src/sentencepiece_model.proto).
    """
    try:
        messages = [dict(_fields(value)) for number, value in _fields(file.read_bytes()) if number == 1]
        return [(message[1].decode(), message.get(3, NORMAL)) for message in messages]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not a SentencePiece model ({error!r}).") from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protocol buffer: int for varints, bytes for the rest."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field of wire type {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if place + size > len(message):
            raise ValueError("the file ends inside a field")
        yield tag >> 3, message[place : place + size]
        place += size
