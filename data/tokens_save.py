"""Write a byte-pair encoding that is given as ranks as an ordinary Hugging Face tokenizer.

A rank file says in which order merged tokens win, not which two parts each was merged from; a Hugging Face file needs the
pairs. The pair of a token is what is left when its bytes are merged with the lower ranks alone.
"""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from moexpand.base.files import write_json
from moexpand.data.chatml import CHATML


@lru_cache(maxsize=1)
def _byte_names() -> list[str]:
    """How byte-level BPE files write each byte (GPT-2's table): itself where printable, else a character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in names]
    names |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def byte_level_name(token: bytes) -> str:
    """A token's bytes as byte-level BPE files write them."""
    names = _byte_names()
    return "".join([names[byte] for byte in token])


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each merged token consists of, in order of rank.

    Args:
        ranks: token bytes -> rank; every single byte is among them.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(candidates)
            if best >= rank:
                break
            at = candidates.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def save_qwen(folder: Path, ranks: dict[bytes, int], specials: dict[str, int], pattern: str, end_of_text: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of a Qwen byte-pair encoding.

    Args:
        folder: an existing folder.
        ranks: token bytes -> id.
        specials: special token -> id.
        pattern: the regular expression that cuts text before merging.
        end_of_text: the special token that ends documents and pads.
    """
    # As in Qwen's own files: names in angle brackets without bars are added tokens, but not special ones.
    added = [_added_token(token, number) for token, number in specials.items()]
    merges = [[byte_level_name(left), byte_level_name(right)] for left, right in merges_of_ranks(ranks)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {byte_level_name(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
    write_json(folder / "tokenizer.json", spec)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        "additional_special_tokens": [
            token["content"] for token in added if token["special"] and token["content"] != end_of_text
        ],
        "bos_token": None,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "unk_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def _added_token(token: str, number: int) -> dict[str, Any]:
    special = token.startswith("<|")
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }
