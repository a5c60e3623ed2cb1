"""What a tokenizer is known by: a SHA-256 over its vocabulary and over how it splits a probe text."""

import hashlib
import json
from collections.abc import Iterable

PROBE = (
    "Don't  merge\r\n\tthis: x_1 = 3.14159; naïve café, 第３图 显示了结果。"
    " def f(a, b):\n        return a[0] != {b: 'µ'}\n\n\n<|x|>"
)
"""Text whose ids enter a fingerprint: two tokenizers of one vocabulary that split text differently must not look alike."""


def fingerprint(vocabulary: dict[str, int], probe_ids: list[int], models: Iterable[bytes] = ()) -> str:
    """Hexadecimal SHA-256.

    Args:
        vocabulary: token -> id, special and added tokens among them.
        probe_ids: of `PROBE`.
        models: bytes of further models by which the tokenizer splits text.
    """
    digest = hashlib.sha256()
    for token, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\0{token}\0".encode())
    digest.update(json.dumps(probe_ids).encode())
    for model in models:
        digest.update(hashlib.sha256(model).digest())
    return digest.hexdigest()
