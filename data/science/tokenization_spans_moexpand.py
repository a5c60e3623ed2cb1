"""Qwen's tokenizer with vocabularies of their own for SMILES, protein, DNA and RNA between tags, for transformers.

`AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)`. The inside of `<SMILES>...</SMILES>`, `<protein>...</protein>`,
`<dna>...</dna>` and `<rna>...</rna>` is written in the pieces of tokenizer_SMILES.model, tokenizer_PROT.model or
tokenizer_XNA.model where they can write all of it; otherwise, and where a tag is not closed, all of it is plain text. This file
needs nothing but transformers, tokenizers and sentencepiece.
"""

import json
import os
import re
import shutil
from typing import Any

import sentencepiece
import tokenizers
from transformers import AddedToken, PreTrainedTokenizer

TAGS = {"SMILES": "SMILES", "protein": "PROT", "dna": "XNA", "rna": "XNA"}
SPAN = re.compile(rf"<({'|'.join(TAGS)})>([^<\s]+)</\1>")
FILES = {"tokenizer_file": "tokenizer.json"} | {
    f"sp_model_{name}": f"tokenizer_{name}.model" for name in ("SMILES", "PROT", "XNA")
}


class SpanTokenizer(PreTrainedTokenizer):
    """Tokens are the names in tokenizer.json, and `<|SMILES_CC|>` and the like for the pieces of domains."""

    vocab_files_names = FILES
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, tokenizer_file: str, sp_model_SMILES: str, sp_model_PROT: str, sp_model_XNA: str, **kwargs: Any) -> None:
        self._files = (tokenizer_file, sp_model_SMILES, sp_model_PROT, sp_model_XNA)
        with open(tokenizer_file, encoding="utf-8") as file:
            spec = json.load(file)
        bare: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._base = tokenizers.Tokenizer.from_str(json.dumps(spec | bare))
        self._added_tokens_decoder = {
            token["id"]: AddedToken(**{key: value for key, value in token.items() if key != "id"})
            for token in spec["added_tokens"]
        }
        self.sp_model_SMILES = _model(sp_model_SMILES)
        self.sp_model_PROT = _model(sp_model_PROT)
        self.sp_model_XNA = _model(sp_model_XNA)
        # Where each domain's ids begin; moexpand reads these lines.
        self.sp_model_SMILES.offset = 151694
        self.sp_model_PROT.offset = 152718
        self.sp_model_XNA.offset = 153742
        self._pieces: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        for name in ("SMILES", "PROT", "XNA"):
            model = getattr(self, f"sp_model_{name}")
            for place in range(model.get_piece_size()):
                token = f"<|{name}_{model.id_to_piece(place)}|>"
                control = model.is_control(place) or model.is_unknown(place) or model.is_unused(place)
                self._pieces[token] = model.offset + place
                self._texts[token] = token if control else model.id_to_piece(place).replace("\u2581", " ")
        self._names = {number: token for token, number in self._pieces.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self._base.get_vocab_size() + len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return self._base.get_vocab() | self._pieces | self._added_tokens_encoder

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text, kwargs = self.prepare_for_tokenization(text, **kwargs)
        tags = {f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")}
        others = set(self._added_tokens_encoder) - tags
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        tokens: list[str] = []
        for part in re.split("(" + "|".join(map(re.escape, sorted(others, key=len, reverse=True))) + ")", text):
            tokens += [part] if part in others else self._tokenize(part)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self._base.normalizer is not None:
            text = self._base.normalizer.normalize_str(text)
        tokens: list[str] = []
        end = 0
        for match in SPAN.finditer(text):
            name = TAGS[match[1]]
            model = getattr(self, f"sp_model_{name}")
            inside = [f"<|{name}_{model.id_to_piece(place)}|>" for place in model.encode(match[2])]
            if "".join(self._texts[token] for token in inside) == match[2]:
                tokens += [*self._plain(text[end : match.start()]), f"<{match[1]}>", *inside, f"</{match[1]}>"]
                end = match.end()
        return tokens + self._plain(text[end:])

    def _plain(self, text: str) -> list[str]:
        return self._base.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._pieces[token] if token in self._pieces else self._base.token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index] if index in self._names else self._base.id_to_token(index) or ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts: list[str] = []
        plain: list[str] = []
        for token in tokens:
            if token in self._texts or token in self._added_tokens_encoder:
                parts += [self._base.decoder.decode(plain), self._texts.get(token, token)]
                plain = []
            else:
                plain.append(token)
        return "".join([*parts, self._base.decoder.decode(plain)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        targets = [os.path.join(save_directory, prefix + name) for name in FILES.values()]
        for source, target in zip(self._files, targets, strict=True):
            if os.path.abspath(source) != os.path.abspath(target):
                shutil.copyfile(source, target)
        return tuple(targets)


def _model(file: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=file)
