"""The checksum of a tensor: one rule for the writer, for `verify` and for whoever reads expansion.json."""

import hashlib
from collections.abc import Sequence

CHECKSUM = "sha256"
"""Recorded as `checksum_algorithm`."""


def tensor_checksum(pieces: Sequence[bytes]) -> str:
    """Checksum of a tensor that was made in pieces of equal size.

    A tensor in one piece has the SHA-256 of its bytes. One of several pieces (a stack of experts, which is never in memory as a
    whole) has the SHA-256 of its pieces' raw SHA-256 digests, 32 bytes each, one after the other; expansion.json says under
    `checksum_pieces` how many pieces such a tensor has.

    Args:
        pieces: raw SHA-256 digest of each piece, in the order of their bytes.

    Returns:
        Hexadecimal digits.
    """
    return pieces[0].hex() if len(pieces) == 1 else hashlib.sha256(b"".join(pieces)).hexdigest()
