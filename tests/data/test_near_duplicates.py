"""Near duplicates: compared with all pairs, in any order, and with the exact similarity of the texts."""

import base64
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moexpand.base.errors import InputError
from moexpand.data.measures import PERMUTATIONS, measure
from moexpand.data.near_duplicates import (
    BANDS,
    ROWS,
    Clusters,
    Drop,
    NearLimits,
    image_clusters,
    near_duplicate_drops,
    text_clusters,
)


def components(count: int, joined) -> list[set[int]]:
    """Connected components by growing sets; `joined(i, j)` says whether two are a pair."""
    sets = [{i} for i in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        if joined(i, j):
            a, b = (next(group for group in sets if member in group) for member in (i, j))
            if a is not b:
                sets.remove(b)
                a |= b
    return sorted(sets, key=min)


def as_sets(labels: np.ndarray) -> list[set[int]]:
    return sorted(({*np.flatnonzero(labels == label).tolist()} for label in np.unique(labels)), key=min)


def signatures_of(seed: int, count: int, copied: float) -> np.ndarray:
    """Rows of which most copy about `copied` of an earlier row's values: chains and families of all sizes."""
    numbers = np.random.default_rng(seed)
    rows = numbers.integers(0, 2**32, (count, PERMUTATIONS), dtype=np.uint32)
    for row in range(1, count):
        if numbers.random() < 0.7:
            same = numbers.random(PERMUTATIONS) < copied + numbers.uniform(-0.1, 0.1)
            rows[row, same] = rows[numbers.integers(row), same]
    return rows


def hashes_of(seed: int, count: int, flips: int) -> np.ndarray:
    """256-bit hashes of which most differ from an earlier one in up to twice `flips` bits."""
    numbers = np.random.default_rng(seed)
    bits = numbers.integers(0, 2, (count, 256), dtype=np.uint8)
    for row in range(1, count):
        if numbers.random() < 0.7:
            bits[row] = bits[numbers.integers(row)]
            changed = numbers.choice(256, numbers.integers(0, 2 * flips + 1), replace=False)
            bits[row, changed] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.sampled_from([0.7, 0.8, 0.9, 1.0]), st.sampled_from([0.6, 0.8, 1.0]))
def test_text_clusters_are_the_components_of_all_pairs_that_share_a_band_and_agree(seed, count, copied, similarity):
    rows = signatures_of(seed, count, copied)

    def joined(i, j):
        band = any((rows[i, b * ROWS : (b + 1) * ROWS] == rows[j, b * ROWS : (b + 1) * ROWS]).all() for b in range(BANDS))
        return band and (rows[i] == rows[j]).sum() >= similarity * PERMUTATIONS

    assert as_sets(text_clusters(rows, similarity)) == components(count, joined)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30), st.sampled_from([0, 1, 5, 10, 16, 32]))
def test_image_clusters_are_the_components_of_all_pairs_within_the_distance(seed, count, distance):
    rows = hashes_of(seed, count, max(distance, 2))
    bits = np.unpackbits(rows.view(np.uint8).reshape(count, 32), axis=1)
    assert as_sets(image_clusters(rows, distance)) == components(count, lambda i, j: (bits[i] != bits[j]).sum() <= distance)


def items_of(seed: int, count: int) -> list[tuple[str, str, dict]]:
    """Records of all kinds, some equal, some near, with keys in no order."""
    numbers = random.Random(seed)
    texts, hashes = signatures_of(seed, max(count, 1), 0.85), hashes_of(seed, max(count, 1), 8)
    items = []
    for i, key in enumerate(numbers.sample(range(1000), count)):
        kind = numbers.choice(["text", "text", "figure", "figure", "table", "chat"])
        picture = [hashes[i].tobytes().hex()] if kind in ("figure", "table") else []
        measures = {
            "exact": f"{numbers.choice([i, numbers.randrange(count)]):032x}",
            "minhash": base64.b64encode(texts[i].tobytes()).decode() if numbers.random() < 0.9 else None,
            "phash": picture if numbers.random() < 0.9 else [None] * len(picture),
        }
        items.append((f"k{key}", kind, measures))
    # Equal records are equal in everything.
    first: dict[str, dict] = {}
    kinds: dict[str, str] = {}
    for i, (key, kind, measures) in enumerate(items):
        first.setdefault(measures["exact"], measures)
        kinds.setdefault(measures["exact"], kind)
        items[i] = (key, kinds[measures["exact"]], first[measures["exact"]])
    return items


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order_and_equals_that_of_all_pairs(seed, count, numbers):
    items = items_of(seed, count)
    limits = NearLimits()

    def joined(i, j):
        (_, kind, a), (_, other, b) = items[i], items[j]
        if a["exact"] == b["exact"]:
            return True
        if kind == other == "text" and a["minhash"] and b["minhash"]:
            x, y = (np.frombuffer(base64.b64decode(m["minhash"]), "<u4") for m in (a, b))
            band = any((x[k * ROWS : (k + 1) * ROWS] == y[k * ROWS : (k + 1) * ROWS]).all() for k in range(BANDS))
            return band and (x == y).mean() >= 0.8
        if {kind, other} <= {"figure", "table"} and a["phash"][0] and b["phash"][0]:
            return (int(a["phash"][0], 16) ^ int(b["phash"][0], 16)).bit_count() <= 10
        return False

    expected = {}
    for group in components(count, joined):
        kept, *rest = sorted(items[i][0] for i in group)
        for key in rest:
            _, kind, measures = next(item for item in items if item[0] == key)
            equal = any(other[0] < key and other[2]["exact"] == measures["exact"] for other in items)
            expected[key] = Drop("duplicate" if equal else "near_text" if kind == "text" else "near_image", kept)
    found = near_duplicate_drops(items, limits)
    assert found == expected
    assert list(found) == sorted(found)
    numbers.shuffle(items)
    assert list(near_duplicate_drops(iter(items), limits).items()) == list(found.items())


def test_pairs_above_the_threshold_are_found_with_the_documented_probability():
    """At a true similarity J of 0.8 and more a pair shares no band with the probability (1 - J^6)^21: 0.17 % at 0.8."""
    numbers = np.random.default_rng(0)
    pairs = 4000
    rows = numbers.integers(0, 2**32, (2 * pairs, PERMUTATIONS), dtype=np.uint32)
    for similarity in (0.8, 0.7):
        same = numbers.random((pairs, PERMUTATIONS)) < similarity
        rows[pairs:] = np.where(same, rows[:pairs], numbers.integers(0, 2**32, same.shape, dtype=np.uint32))
        labels = text_clusters(rows, 0.5)  # verification lets all but a millionth pass
        missed = (labels[:pairs] != labels[pairs:]).mean()
        expected = (1 - similarity**ROWS) ** BANDS
        assert abs(missed - expected) < 5 * (expected / pairs) ** 0.5, similarity
    assert (1 - 0.8**ROWS) ** BANDS < 0.002


def text_items(texts: dict[str, str], kind: str = "text") -> list[tuple[str, str, dict]]:
    return [(key, kind, measure({"text": text}, Path())) for key, text in texts.items()]


def words(seed: int, count: int) -> list[str]:
    numbers = random.Random(seed)
    return [f"word{numbers.randrange(3000)}" for _ in range(count)]


def test_an_edited_copy_of_a_text_is_dropped_and_another_text_is_not():
    base = words(1, 500)
    edited = [*base[:250], "one", "new", "word", *base[250:]]
    half = base[:250] + words(2, 250)
    found = near_duplicate_drops(
        text_items({"b": " ".join(base), "a": " ".join(edited), "c": " ".join(half), "d": " ".join(words(3, 500))}), NearLimits()
    )
    assert found == {"b": Drop("near_text", "a")}


def test_equal_records_are_duplicates_whatever_their_kind_and_templates_and_chats_are_compared_for_nothing_else():
    base = words(1, 500)
    texts = {"a": " ".join(base), "b": "  ".join(base), "c": " ".join([*base, "more"])}
    assert near_duplicate_drops(text_items(texts, "chat"), NearLimits()) == {"b": Drop("duplicate", "a")}
    assert near_duplicate_drops(text_items(texts, "record"), NearLimits()) == {"b": Drop("duplicate", "a")}
    assert near_duplicate_drops(text_items(texts), NearLimits(None, None)) == {"b": Drop("duplicate", "a")}
    assert near_duplicate_drops(text_items(texts), NearLimits()) == {"b": Drop("duplicate", "a"), "c": Drop("near_text", "a")}


def test_short_texts_with_the_same_beginning_are_kept():
    texts = {f"k{i}": f"The melting point of compound {i} is {300 + i} kelvin." for i in range(50)}
    assert near_duplicate_drops(text_items(texts), NearLimits()) == {}


def test_a_chain_is_one_cluster_and_only_pictures_alone_in_their_record_are_compared():
    def item(key, kind, *hashes):
        return key, kind, {"exact": key.encode().hex().zfill(32), "minhash": None, "phash": [f"{bits:064x}" for bits in hashes]}

    chain = [item(f"k{i}", "figure", (1 << 8 * i) - 1) for i in range(20)]
    assert near_duplicate_drops(chain, NearLimits()) == {key: Drop("near_image", "k0") for key, _, _ in sorted(chain)[1:]}
    assert near_duplicate_drops(chain, NearLimits(image_distance=7)) == {}
    assert near_duplicate_drops([item("a", "image", 1, 2), item("b", "image", 1, 2)], NearLimits()) == {}
    assert near_duplicate_drops([item("a", "chat", 1), item("b", "chat", 1)], NearLimits()) == {}
    assert near_duplicate_drops([item("b", "table", 1), item("a", "figure", 1)], NearLimits()) == {"b": Drop("near_image", "a")}


@pytest.mark.parametrize("kind", ["figure", "text"])
def test_what_is_written_beside_a_picture_makes_no_near_duplicate(kind):
    """Figures of one document share the paragraphs that mention them."""
    shared = " ".join(words(1, 300))
    items = text_items({"a": f"Figure 1: left. {shared}", "b": f"Figure 2: right. {shared}"}, kind)
    for bits, (_, _, measures) in enumerate(items):
        measures["phash"] = [f"{bits * (2**256 - 1):064x}"]
    assert near_duplicate_drops(items, NearLimits()) == {}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=80))
def test_clusters_are_components_and_their_root_is_the_smallest_member(count, pairs):
    pairs = [(a % count, b % count) for a, b in pairs]
    clusters = Clusters(count)
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):
        array = np.array(part, np.int64).reshape(-1, 2)
        clusters.unite(array[:, 0], array[:, 1])
    wanted = components(count, lambda i, j: (i, j) in pairs or (j, i) in pairs)
    roots = clusters.roots()
    assert as_sets(roots) == wanted
    assert all(roots[i] == min(group) for group in wanted for i in group)


def test_a_large_family_costs_no_comparison_of_everything_with_everything():
    """10,000 near copies of one text and 100 that only share a band with them: 51 million pairs, of which few are compared."""
    numbers = np.random.default_rng(1)
    rows = np.repeat(numbers.integers(0, 2**32, (1, PERMUTATIONS), dtype=np.uint32), 10_100, axis=0)
    rows[np.arange(10_000), numbers.integers(ROWS, PERMUTATIONS, 10_000)] = numbers.integers(0, 2**32, 10_000, dtype=np.uint32)
    rows[10_000:, ROWS:] = numbers.integers(0, 2**32, (100, PERMUTATIONS - ROWS), dtype=np.uint32)
    start = time.process_time()
    labels = text_clusters(rows, 0.8)
    assert time.process_time() - start < 15
    assert len(np.unique(labels)) == 101


def test_an_empty_build_has_no_duplicates():
    assert near_duplicate_drops([], NearLimits()) == {}


@pytest.mark.parametrize(
    "limits", [{"text_similarity": 0.4}, {"text_similarity": 1.1}, {"image_distance": -1}, {"image_distance": 33}]
)
def test_limits_out_of_range_are_refused_by_name(limits):
    with pytest.raises(InputError, match=rf"filters\.{next(iter(limits))} is"):
        NearLimits(**limits)
