"""Near duplicates over all records of a build: MinHash for texts, pHash for pictures.

Two records are joined when they are equal, when they are texts whose signatures agree, or when they are pictures whose hashes are
close. A cluster is a connected component of these pairs, and the record with the smallest key stays. So the result is a function
of the set of records: their order and the number of processes do not enter.

Pairs are found without comparing everything with everything. Texts are compared if one band of `ROWS` signature values is equal:
at Jaccard similarity J that misses a pair with the probability (1 - J**ROWS) ** BANDS, which is 0.2 % at 0.8. Hashes of pictures
within a distance d are equal in one of d + 1 bands, so no pair is missed.

N records, P values of a signature.
"""

import base64
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moexpand.base.errors import InputError
from moexpand.data.measures import HASH_SIDE, PERMUTATIONS
from moexpand.data.order import mix64

ROWS = 6
BANDS = PERMUTATIONS // ROWS
BITS = HASH_SIDE * HASH_SIDE
CHUNK = 16_384
"""Pairs that are compared at a time: 16 MiB of signatures."""
MAX_DISTANCE = 32


@dataclass(frozen=True)
class NearLimits:
    """What counts as a near duplicate.

    Raises:
        InputError: a limit lies outside of its range.
    """

    text_similarity: float | None = 0.8
    """Share of equal signature values (an estimate of the Jaccard similarity of runs of five words) from which texts are one."""
    image_distance: int | None = 10
    """Bits of 256 in which the hashes of two pictures may differ."""
    text_kinds: tuple[str, ...] = ("text",)
    """Kinds compared by text. Texts from templates and chats with a long system prompt are alike by design."""
    image_kinds: tuple[str, ...] = ("figure", "table", "image")
    """Kinds compared by picture, of records with exactly one."""

    def __post_init__(self) -> None:
        if self.text_similarity is not None and not 0.5 <= self.text_similarity <= 1.0:
            raise InputError(
                f"filters.text_similarity is {self.text_similarity}; give a fraction from 0.5 to 1, or null to compare no texts."
            )
        if self.image_distance is not None and not 0 <= self.image_distance <= MAX_DISTANCE:
            raise InputError(
                f"filters.image_distance is {self.image_distance}; give 0 to {MAX_DISTANCE} bits of {BITS}, or null to "
                "compare no pictures. Unlike plots of one style begin at about 16."
            )


class Drop(NamedTuple):
    """Why a record goes and which one stays in its place."""

    reason: str
    kept: str


def near_duplicate_drops(items: Iterable[tuple[str, str, dict[str, Any]]], limits: NearLimits) -> dict[str, Drop]:
    """Which records of a build are superfluous.

    Args:
        items: (key, kind, measures) of every record that the filters kept, in any order; keys differ.
        limits: what counts as near.

    Returns:
        For the key of each superfluous record, sorted: why (`duplicate`: equal to one with a smaller key; `near_text`;
        `near_image`) and the key of the record that stays.
    """
    keys: list[str] = []
    exact, texts, images = bytearray(), bytearray(), bytearray()
    text_items, image_items = array("q"), array("q")
    for key, kind, measures in items:
        if kind in limits.text_kinds and measures["minhash"] and not measures["phash"]:
            text_items.append(len(keys))
            texts += base64.b64decode(measures["minhash"])
        if kind in limits.image_kinds and len(measures["phash"]) == 1 and measures["phash"][0]:
            image_items.append(len(keys))
            images += bytes.fromhex(measures["phash"][0])
        exact += bytes.fromhex(measures["exact"])
        keys.append(key)

    # Clusters know records by the rank of their keys, so that the smallest member is the one with the smallest key.
    by_rank = sorted(range(len(keys)), key=keys.__getitem__)
    rank = np.empty(len(keys), np.int64)
    rank[by_rank] = np.arange(len(keys))
    clusters = Clusters(len(keys))

    digests = np.frombuffer(exact, np.uint8).reshape(-1, 16)[by_rank]
    distinct, place = _distinct(digests)
    clusters.unite(np.arange(len(keys)), distinct[place])
    equal = distinct[place] != np.arange(len(keys))
    if limits.text_similarity is not None:
        rows = rank[np.asarray(text_items, np.int64)]
        signatures = np.frombuffer(texts, "<u4").reshape(-1, PERMUTATIONS)
        clusters.unite(rows, rows[text_clusters(signatures, limits.text_similarity)])
    image_rows = rank[np.asarray(image_items, np.int64)]
    if limits.image_distance is not None:
        hashes = np.frombuffer(images, np.uint64).reshape(-1, BITS // 64)
        clusters.unite(image_rows, image_rows[image_clusters(hashes, limits.image_distance)])

    kept = clusters.roots()
    pictures = np.zeros(len(keys), bool)
    pictures[image_rows] = True
    drops = {}
    for row in np.flatnonzero(kept != np.arange(len(keys))).tolist():
        reason = "duplicate" if equal[row] else "near_image" if pictures[row] else "near_text"
        drops[keys[by_rank[row]]] = Drop(reason, keys[by_rank[kept[row]]])
    return drops


def text_clusters(signatures: np.ndarray, similarity: float) -> np.ndarray:
    """Clusters of texts by their MinHash signatures.

    Args:
        signatures: uint32 [N, P].
        similarity: share of equal values from which two texts are joined, if they share a band.

    Returns:
        int64 [N], a member of everyone's cluster that is the same for all its members.
    """
    distinct, place = _distinct(_fingerprints(signatures))
    clusters = Clusters(len(distinct))
    needed = math.ceil(similarity * signatures.shape[1] - 1e-9)
    for band in range(BANDS):
        values = signatures[distinct, band * ROWS : (band + 1) * ROWS]
        for left, right in _pairs(_fold(values, 0), clusters):
            near = (signatures[distinct[left]] == signatures[distinct[right]]).sum(axis=1) >= needed
            clusters.unite(left[near], right[near])
    return distinct[clusters.roots()][place]


def image_clusters(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Clusters of pictures by their perceptual hashes.

    Args:
        hashes: uint64 [N, BITS / 64].
        distance: bits in which two hashes may differ to be joined.

    Returns:
        int64 [N], a member of everyone's cluster that is the same for all its members.
    """
    distinct, place = _distinct(_fingerprints(hashes))
    hashes = hashes[distinct]
    clusters = Clusters(len(hashes))
    bits = np.unpackbits(hashes.view(np.uint8).reshape(len(hashes), BITS // 8), axis=1)
    for band in range(distance + 1):
        # Neighbouring frequencies are alike in most pictures, so every band takes its bits from everywhere.
        for left, right in _pairs(_fold(np.packbits(bits[:, band :: distance + 1], axis=1), 0), clusters):
            near = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1) <= distance
            clusters.unite(left[near], right[near])
    return distinct[clusters.roots()][place]


class Clusters:
    """Union-find over 0 .. N-1 that works on arrays of pairs; the root of a cluster is its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def find(self, members: np.ndarray) -> np.ndarray:
        """The smallest member of each one's cluster, int64 [len(members)]."""
        roots = self._parent[members]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[members] = roots
        return roots

    def unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Make one cluster of the clusters of left[i] and right[i], for every i."""
        while len(left):
            a, b = self.find(left), self.find(right)
            differ = a != b
            left, right, a, b = left[differ], right[differ], a[differ], b[differ]
            # Several pairs may want another parent for one root: the smallest wins, and the rest are joined in the next round.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self) -> np.ndarray:
        """The smallest member of everyone's cluster, int64 [N]."""
        return self.find(np.arange(len(self._parent)))


def _pairs(values: np.ndarray, clusters: Clusters) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Portions of the pairs of equal values whose members are not in one cluster yet; the caller joins those that are near.

    Members are sorted by value, and those of one value by cluster, the largest first. So all that is apart from a member lies
    before its cluster or behind it, and each looks at what lies behind, one place after the other. After 1, 4, 16, ... places
    members are sorted anew: clusters that have grown save the comparisons that could add nothing. The last round goes to the end.
    """
    members = np.argsort(values, kind="stable")
    places = 1
    while True:
        members, end, last = _by_cluster(members, values, clusters)
        here = np.flatnonzero(end < last)
        for place in range(places):
            here = here[end[here] + place < last[here]]
            if not len(here):
                return
            for part in range(0, len(here), CHUNK):
                some = here[part : part + CHUNK]
                left, right = members[some], members[end[some] + place]
                apart = clusters.find(left) != clusters.find(right)
                if apart.any():
                    yield left[apart], right[apart]
        places *= 4


def _by_cluster(members: np.ndarray, values: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members sorted by value, size of their cluster among those of the value, and cluster; values of one cluster are left out.

    Returns int64 arrays: members, and for the place of each where its cluster ends and where its value ends (one behind).
    """
    roots = clusters.find(members)
    order = np.lexsort((roots, values[members]))
    members, roots = members[order], roots[order]
    size = _runs(values[members], roots)[1]
    several = size < _runs(values[members])[1]
    members, roots, size = members[several], roots[several], size[several]
    order = np.lexsort((roots, -size, values[members]))
    members, roots = members[order], roots[order]
    return members, _runs(values[members], roots)[0], _runs(values[members])[0]


def _runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place of columns sorted together, where the run of equal entries ends that it lies in, and its length; int64."""
    begins = np.zeros(len(columns[0]), bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    first = np.flatnonzero(begins)
    length = np.diff(np.append(first, len(begins)))
    return np.repeat(first + length, length), np.repeat(length, length)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the first of each set of equal rows, ascending, and for every row which of them is its own; int64.

    `rows` is an array [N, C] of integers.
    """
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(len(rows))
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def _fingerprints(rows: np.ndarray) -> np.ndarray:
    """128 bits of every row [N, C], uint64 [N, 2]: far fewer than two in 10**20 unlike rows have the same."""
    return np.stack([_fold(rows, 0), _fold(rows, 1)], axis=1)


def _fold(rows: np.ndarray, seed: int) -> np.ndarray:
    """64 bits of every row [N, C] of unsigned integers, uint64 [N]."""
    folded = np.full(len(rows), seed, np.uint64)
    for column in range(rows.shape[1]):
        folded = mix64(folded ^ rows[:, column].astype(np.uint64))
    return folded
