"""Tokenizers: Qwen's own vocabulary without any download, its 8,192-rank prefix, both with science beside them, and folders.

`load_tokenizer` gives an object with `encode`, `decode`, `eos_id`, `vocab_size`, `fingerprint` and `save`. The Qwen vocabulary
is the file `qwen.tiktoken` that the PyPI package `dashscope` carries (Apache-2.0); the package's code is never imported. The
first 8,192 ranks of a byte-pair encoding are a valid byte-pair encoding of their own: that is `qwen-8192`. `qwen-science` and
`qwen-8192-science` write what stands between tags in vocabularies of its own; see `spans`.

Text is always plain text here: "<|endoftext|>" in a document becomes the tokens of these characters, never the special token.
"""

import base64
import importlib.util
import json
import unicodedata
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import tokenizers

from moexpand.base.errors import InputError
from moexpand.base.files import read_json, sha256
from moexpand.data.fingerprint import PROBE, fingerprint
from moexpand.data.science_tokenizer import SPECIALS, ScienceTokenizer
from moexpand.data.spans import SpanTokenizer, domains_of, model_files
from moexpand.data.tokens_save import byte_level_name, save_qwen

DASHSCOPE = "dashscope==2.0.2"
QWEN_FILE_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN_RANKS = 151643
QWEN_PADDED = 151936
"""Rows of the embedding in Qwen3's configurations; 151,669 of them are tokens."""
SMALL_RANKS = 8192
SMALL_PADDED = 8448
SCIENCE_PADDED = 155008
"""Rows of the embedding in Intern-S1-Pro's configuration; 154,766 of them are tokens here."""
SMALL_SCIENCE_PADDED = 11392
NAMES = ("qwen", "qwen-8192", "qwen-science", "qwen-8192-science")
END_OF_TEXT = "<|endoftext|>"
QWEN_SPECIALS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    name: str
    vocab_size: int
    """Rows of the embedding, padding included."""
    eos_id: int
    """Written after every document."""
    specials: dict[str, int]
    """Added token -> id: control tokens such as <|im_start|>, and markers such as <think>."""
    stripping: frozenset[str]
    """Those of `specials` that swallow white space beside them, or only match whole words, in Hugging Face's tokenizers."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the vocabulary and of how a probe text is split; equal for one tokenizer in two wrappings."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens appear by name."""

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face tokenizer (tokenizer.json, tokenizer_config.json) into an existing folder."""


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_folder: `qwen` (the full vocabulary), `qwen-8192` (its first 8,192 ranks), either with `-science`, or a folder
            with a tokenizer.json, and tokenizer_DOMAIN.model beside it if it has such.

    Raises:
        InputError: no such name or folder, files that are damaged or do not belong together, or the package that carries the Qwen
            vocabulary is missing or altered.
    """
    if name_or_folder == "qwen":
        return QwenTokenizer("qwen", QWEN_RANKS, QWEN_PADDED)
    if name_or_folder == "qwen-8192":
        return QwenTokenizer("qwen-8192", SMALL_RANKS, SMALL_PADDED)
    if name_or_folder == "qwen-science":
        return ScienceTokenizer(QwenTokenizer("qwen-science", QWEN_RANKS, QWEN_PADDED, SPECIALS), SCIENCE_PADDED)
    if name_or_folder == "qwen-8192-science":
        return ScienceTokenizer(QwenTokenizer("qwen-8192-science", SMALL_RANKS, SMALL_PADDED, SPECIALS), SMALL_SCIENCE_PADDED)
    folder = Path(name_or_folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"The tokenizer {name_or_folder!r} is not one of {', '.join(NAMES)}, and no folder that holds a tokenizer.json."
        )
    base = FolderTokenizer(folder)
    return SpanTokenizer(base, domains_of(folder)) if model_files(folder) else base


class QwenTokenizer:
    """The Qwen byte-pair encoding through tiktoken, all of its ranks or the first ones."""

    stripping: frozenset[str] = frozenset()

    def __init__(self, name: str, ranks: int, vocab_size: int, further: tuple[str, ...] = ()) -> None:
        # tiktoken is imported here so that a folder's tokenizer works without it.
        import tiktoken

        self.name = name
        self.vocab_size = vocab_size
        self.ranks = {token: rank for token, rank in _qwen_ranks().items() if rank < ranks}
        self.specials = {token: ranks + i for i, token in enumerate((*QWEN_SPECIALS, *further))}
        self.eos_id = self.specials[END_OF_TEXT]
        self._encoding = tiktoken.Encoding(name, pat_str=QWEN_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.specials)

    def normalize(self, text: str) -> str:
        """`text` in NFC, as Qwen's tokenizers read it."""
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` after NFC normalisation; the names of special tokens are plain text."""
        return self._encoding.encode_ordinary(self.normalize(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token -> id; ordinary ones as byte-level BPE files write them."""
        return {byte_level_name(token): rank for token, rank in self.ranks.items()} | self.specials

    @cached_property
    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        return fingerprint(self.vocabulary, self.encode(PROBE))

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        save_qwen(Path(folder), self.ranks, self.specials, QWEN_PATTERN, END_OF_TEXT)


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder, run by `tokenizers` alone."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder.resolve())
        self._folder = folder
        spec = read_json(folder / "tokenizer.json")
        try:
            self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
            # Without its added tokens the tokenizer cannot turn their names in a document into special ids.
            self._plain = tokenizers.Tokenizer.from_str(
                json.dumps(spec | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
            )
        except Exception as error:  # `tokenizers` raises bare Exception for every flaw of the file
            raise InputError(f"{folder / 'tokenizer.json'} is not a tokenizer that `tokenizers` can read: {error}.") from None
        self.vocabulary: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        added = [(token.content, number, token) for number, token in self._full.get_added_tokens_decoder().items()]
        self.specials = {content: number for content, number, _ in added}
        self.stripping = frozenset(name for name, _, token in added if token.lstrip or token.rstrip or token.single_word)
        settings = _optional_json(folder / "config.json")
        settings = settings.get("text_config", settings)
        self.vocab_size = max(int(settings.get("vocab_size", 0)), max(self.vocabulary.values()) + 1)
        self.eos_id = self._find_eos(settings)

    def _find_eos(self, settings: dict) -> int:
        # Chat models name <|im_end|> as their end; documents of pretraining are still parted by <|endoftext|>.
        named = _optional_json(self._folder / "tokenizer_config.json").get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        for token in (END_OF_TEXT, named):
            if token in self.vocabulary:
                return self.vocabulary[token]
        configured = settings.get("eos_token_id")
        if isinstance(configured, list):
            configured = configured[0] if configured else None
        if not isinstance(configured, int):
            raise InputError(f"{self._folder} names no end-of-text token; add eos_token to its tokenizer_config.json.")
        return configured

    def normalize(self, text: str) -> str:
        """`text` as the file's normaliser makes it."""
        return text if self._plain.normalizer is None else self._plain.normalizer.normalize_str(text)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the names of special tokens are plain text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens appear by name."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        return fingerprint(self.vocabulary, self.encode(PROBE))

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files as they are."""
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenization_*.py")
        for file in sorted(file for name in names for file in self._folder.glob(name) if file.is_file()):
            (Path(folder) / file.name).write_bytes(file.read_bytes())


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


@lru_cache(maxsize=1)
def _qwen_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, in order of rank, from dashscope's copy of qwen.tiktoken."""
    try:
        spec = importlib.util.find_spec("dashscope")
    except ValueError:
        spec = None
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0]) / "resources" / "qwen.tiktoken" if places else None
    advice = f"run `pip install --no-deps {DASHSCOPE}`, or give a Hugging Face folder as the tokenizer"
    if file is None or not file.is_file():
        raise InputError(f"The Qwen vocabulary is missing: the package dashscope, which carries it, is not installed; {advice}.")
    if sha256(file) != QWEN_FILE_SHA256:
        raise InputError(f"{file} is not the Qwen vocabulary that this version knows; {advice}.")
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
