"""Rows of embedding and head follow the meaning of their tokens into another vocabulary."""

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moexpand.base.errors import InputError
from moexpand.upcycle import vocabulary
from moexpand.upcycle.tokenizer_files import Token, read_tokens
from moexpand.upcycle.vocabulary import Growth, grow, growth_for, mean_row, read_vocab_map, rows
from tests.trained_tokenizers import SPECIALS, byte_level, saved

BF16 = np.dtype(ml_dtypes.bfloat16)


def table(size: int, width: int = 24, dtype: np.dtype = BF16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, width)).astype(dtype)


def reader(parent: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: parent[first:last]


def grown(growth: Growth, parent: np.ndarray, step: int | None = None) -> np.ndarray:
    """All rows of the child, `step` at a time."""
    step = step or growth.size
    mean = mean_row(growth, reader(parent))
    bounds = [(first, min(first + step, growth.size)) for first in range(0, growth.size, step)]
    return np.concatenate([rows(growth, reader(parent), mean, *pair) for pair in bounds])


def close(found: np.ndarray, exact: np.ndarray) -> bool:
    """Equal but for one rounding to bf16."""
    return bool(np.all(np.abs(found.astype(np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-30))


# ---------------------------------------------------------------- meaning


def test_every_token_of_a_permuted_vocabulary_keeps_its_row(tokenizer_folders: dict[str, Path]) -> None:
    old, new = (Tokenizer.from_file(str(tokenizer_folders[name] / "tokenizer.json")) for name in ("old", "permuted"))
    size = old.get_vocab_size() + 5
    parent = table(size)
    growth = grow(tokenizer_folders["old"], tokenizer_folders["permuted"], size, size)
    child = grown(growth, parent)
    for token, number in new.get_vocab().items():
        assert np.array_equal(child[number], parent[old.token_to_id(token)]), token
    assert (growth.moved, growth.averaged, growth.filled, growth.dropped) == (size - 5, 0, 5, 0)
    text = "The experts of größere Modelle<|im_end|> 専家"
    assert np.array_equal(child[new.encode(text).ids], parent[old.encode(text).ids])


def test_a_special_token_that_moved_takes_its_row_along(tokenizer_folders: dict[str, Path]) -> None:
    """The trap: in the new vocabulary other tokens stand where special ones stood; by number, <|im_end|> would get their rows."""
    files = (tokenizer_folders[name] / "tokenizer.json" for name in ("old", "inserted"))
    old, new = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    size = len(old)
    parent = table(size)
    child = grown(grow(tokenizer_folders["old"], tokenizer_folders["inserted"], size, len(new)), parent)
    for special in SPECIALS:
        assert new[special] != old[special]
        assert np.array_equal(child[new[special]], parent[old[special]])
        assert not np.array_equal(child[new[special]], parent[new[special]])
    by_number = sum(np.array_equal(child[number], parent[number]) for number in range(size))
    assert by_number < size / 10


@pytest.mark.parametrize("name", ["inserted", "other"])
def test_each_row_follows_the_documented_rule(tokenizer_folders: dict[str, Path], name: str) -> None:
    """Against the tokenizers library: its vocabulary, its decoder, its splits, float64 means."""
    old, new = (Tokenizer.from_file(str(tokenizer_folders[key] / "tokenizer.json")) for key in ("old", name))
    tokens, size = old.get_vocab_size(), new.get_vocab_size() + 7
    parent = table(tokens + 9, seed=4)
    growth = grow(tokenizer_folders["old"], tokenizer_folders[name], tokens + 9, size)
    child = grown(growth, parent)
    mean = parent[:tokens].astype(np.float64).mean(axis=0)
    kinds: Counter[str] = Counter()
    for number in range(size):
        token = new.id_to_token(number)
        text = "" if token is None else new.decode([number], skip_special_tokens=False)
        if token is not None and old.token_to_id(token) is not None:
            kinds["moved"] += 1
            assert np.array_equal(child[number], parent[old.token_to_id(token)])
        elif text and "\ufffd" not in text:
            kinds["averaged"] += 1
            pieces = old.encode(text, add_special_tokens=False).ids
            assert len(pieces) > 1
            assert close(child[number], parent[pieces].astype(np.float64).mean(axis=0))
        else:
            kinds["filled"] += 1
            assert close(child[number], mean)
    assert kinds == {key: value for key in ("moved", "averaged", "filled") if (value := getattr(growth, key))}
    assert kinds["averaged"] >= 2
    assert kinds["filled"] >= 7
    lost = [token for token in old.get_vocab() if new.token_to_id(token) is None]
    assert growth.dropped == len(lost)
    assert set(growth.dropped_names) <= set(lost)
    assert len(growth.dropped_names) == min(5, len(lost))


def test_parts_of_characters_are_filled_not_split(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """A byte-level token may be half a character: it has no text that another tokenizer could split."""
    content = json.loads((tokenizer_folders["old"] / "tokenizer.json").read_text())
    half = "ä¸ĵ"[:2]  # two of the three bytes of a Chinese character, as byte-level vocabularies write them
    content["model"]["vocab"][half] = 900
    new = saved(Tokenizer.from_str(json.dumps(content)), tmp_path / "new")
    growth = grow(tokenizer_folders["old"], new, 1000, 1000)
    assert growth.sources[900] is None


def test_tokens_match_by_meaning_across_kinds_of_tokenizers(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """Byte-level files write " the" as Ġthe and é as Ã©, SentencePiece-like ones as ▁the and é; to the former, é is one byte."""
    pieces = ["<unk>", "▁the", "é", "s", "<0xC3>", "▁wholly"]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    old = byte_level(700, ["the the the é é é café café", "the café"] * 4)
    growth = grow(saved(old, tmp_path / "old"), saved(tokenizer, tmp_path / "new"), 1000, 6)
    assert [growth.sources[number] for number in (1, 2, 3, 4)] == [old.token_to_id(name) for name in ("Ġthe", "Ã©", "s", "Ã")]
    assert growth.sources[5] == tuple(old.encode(" wholly").ids)


def test_what_the_parents_tokenizer_cannot_split_is_filled(tmp_path: Path) -> None:
    """It says <unk> to characters that it lacks; the row of <unk> is no ancestor."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>"))
    parent = saved(tokenizer, tmp_path / "old")
    tokenizer.add_tokens(["ab", "ac", "c"])
    growth = grow(parent, saved(tokenizer, tmp_path / "new"), 3, 6)
    assert growth.sources == (0, 1, 2, (1, 2), None, None)


# ---------------------------------------------------------------- streaming


def test_rows_do_not_depend_on_the_portions_and_are_read_once(tokenizer_folders: dict[str, Path]) -> None:
    size = len(read_tokens(tokenizer_folders["old"]))
    parent = table(size)
    growth = grow(tokenizer_folders["old"], tokenizer_folders["inserted"], size, size + 40)
    whole = grown(growth, parent)
    for step in (1, 7, 64, 1000):
        assert grown(growth, parent, step).tobytes() == whole.tobytes()
    reads: Counter[int] = Counter()

    def read(first: int, last: int) -> np.ndarray:
        reads.update(range(first, last))
        return parent[first:last]

    mean = mean_row(growth, reader(parent))
    for start in range(0, growth.size, 50):
        rows(growth, read, mean, start, min(start + 50, growth.size))
    pieces = Counter(piece for source in growth.sources if isinstance(source, tuple) for piece in source)
    assert reads - pieces == Counter(range(size))


def test_a_vocabulary_of_real_size_is_read_in_long_runs() -> None:
    """151,936 -> 155,008 rows as from Qwen3: a prefix that stays, special tokens after it that move."""
    sources = (*range(151_643), *(None for _ in range(3_339)), *range(151_643, 151_669))
    growth = Growth(155_008, 151_936, sources, ((0, 151_669),))
    parent = np.arange(151_936, dtype=np.float32)[:, None].repeat(4, axis=1)
    calls = []

    def read(first: int, last: int) -> np.ndarray:
        calls.append(last - first)
        return parent[first:last]

    mean = mean_row(growth, read)
    assert mean is not None
    assert mean.tolist() == [75_834.0] * 4
    calls.clear()
    child = np.concatenate([rows(growth, read, mean, start, min(start + 1024, 155_008)) for start in range(0, 155_008, 1024)])
    assert len(calls) == 149 + 1
    assert sum(calls) == 151_669
    assert np.array_equal(child[:, 0], [75_834.0 if source is None else source for source in sources])
    assert len(json.dumps(growth.to_json())) < 300


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
def test_the_mean_of_all_rows_leaves_padding_out(dtype: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = table(300, 16, dtype)
    parent[200:] = 1000
    growth = Growth(2, 300, (None, (1, 1, 7)), ((0, 120), (130, 200)))
    expected = np.concatenate([parent[:120], parent[130:200]]).astype(np.float64).mean(axis=0)
    mean = mean_row(growth, reader(parent))
    assert mean is not None
    assert mean.dtype == dtype
    assert np.allclose(mean.astype(np.float64), expected, rtol=2**-8, atol=0)
    child = grown(growth, parent).astype(np.float64)
    assert np.allclose(child[1], (2 * parent[1].astype(np.float64) + parent[7]) / 3, rtol=2**-8, atol=2**-12)
    assert mean_row(Growth(1, 300, (5,), ()), reader(parent)) is None


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-(2**30), 2**30), st.integers(-40, 10)), min_size=1, max_size=3))
def test_means_are_rounded_once(parts: list[tuple[int, int]]) -> None:
    """bf16 by way of fp32 rounds twice: 1 + 2^-8 + 2^-40 would become 1 instead of 1 + 2^-7. Exact fractions decide here."""
    values = [float(integer) * 2.0**exponent for integer, exponent in parts]
    value = sum(values)
    got = Fraction(float(vocabulary._rounded_once(np.array([value]), BF16)[0]))
    bits = int(np.array(got, dtype=np.float32).astype(BF16).view(np.uint16)) if got else 0
    around = np.array([bits + 1, bits - 1] if got else [1, 0x8001], dtype=np.uint16).view(BF16).astype(np.float64)
    distance = abs(Fraction(value) - got)
    for other in map(Fraction, around.tolist()):
        assert distance < abs(Fraction(value) - other) or (distance == abs(Fraction(value) - other) and bits % 2 == 0)


def test_the_case_in_which_fp32_rounds_twice() -> None:
    assert vocabulary._rounded_once(np.array([1 + 2**-8 + 2**-40]), BF16)[0] == 1 + 2**-7
    assert vocabulary._rounded_once(np.array([-1 - 2**-8 + 2**-40]), BF16)[0] == -1


# ---------------------------------------------------------------- JSON


@given(st.integers(1, 30), st.integers(1, 60), st.data())
def test_json_brings_back_the_same_growth(parent_size: int, size: int, data: st.DataObject) -> None:
    row = st.integers(0, parent_size - 1)
    source = st.one_of(st.none(), row, st.lists(row, min_size=1, max_size=4).map(tuple))
    sources = tuple(data.draw(st.lists(source, min_size=size, max_size=size)))
    growth = Growth(size, parent_size, sources, ((0, parent_size),), 2, ("a", "ü"))
    again = Growth.from_json(json.loads(json.dumps(growth.to_json())), "plan.json")
    assert again == growth
    parent = table(parent_size, 3, np.dtype(np.float64))
    for number, found in enumerate(grown(again, parent)):
        where = sources[number]
        expected = (
            parent.mean(axis=0) if where is None else parent[list(where) if isinstance(where, tuple) else [where]].mean(axis=0)
        )
        assert np.allclose(found, expected, rtol=1e-12)


def test_the_json_is_short_when_tokens_stay_together() -> None:
    growth = Growth(8, 6, (0, 1, 2, None, None, 5, (3, 4), 3), ((0, 6),))
    assert growth.to_json()["moved"] == [[0, 0, 3], [5, 5, 1], [7, 3, 1]]
    assert growth.to_json()["averaged"] == {"6": [3, 4]}


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1}, {"size": 7}, {"size": "8"}, {"parent_size": 5}, {"moved": [[0, 0]]}, {"moved": [[0, 0, 3], [2, 0, 1]]},
        {"moved": [[0, 0, 0]]}, {"moved": [[-1, 0, 1]]}, {"moved": None}, {"averaged": {"6": []}}, {"averaged": {"6": [9]}},
        {"averaged": {"0": [1]}}, {"averaged": {"x": [1]}}, {"averaged": {"6": 3}}, {"used": []}, {"used": [[0, 9]]},
        {"dropped": None},
    ],
)  # fmt: skip
def test_an_edited_growth_is_refused(change: dict) -> None:
    value = Growth(8, 6, (0, 1, 2, None, None, 5, (3, 4), 3), ((0, 6),)).to_json()
    assert Growth.from_json(value, "plan.json").size == 8
    with pytest.raises(InputError, match=r"plan\.json holds a vocabulary"):
        Growth.from_json(value | change, "plan.json")


# ---------------------------------------------------------------- keys and refusals


def test_ids_are_never_guessed(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    old, size = tokenizer_folders["old"], len(read_tokens(tokenizer_folders["old"]))
    assert growth_for(old, 500) is None
    assert growth_for(old, 500, vocab_size=500) is None
    assert growth_for(old, 500, tokenizer=old) is None
    with pytest.raises(InputError, match=r"vocab_size=600 differs from the parent's 500 rows.*tokenizer=FOLDER.*vocab_map=FILE"):
        growth_for(old, 500, vocab_size=600)
    padded = growth_for(old, 500, tokenizer=old, vocab_size=600)
    assert padded is not None
    assert (padded.moved, padded.averaged, padded.filled) == (size, 0, 600 - size)
    reordered = growth_for(old, 500, tokenizer=tokenizer_folders["permuted"])
    assert reordered == grow(old, tokenizer_folders["permuted"], 500, 500)
    with pytest.raises(InputError, match="give one of them"):
        growth_for(old, 500, tokenizer=old, vocab_map=tmp_path / "map.json")


def test_a_tokenizer_larger_than_its_embedding_is_refused(tokenizer_folders: dict[str, Path]) -> None:
    size = len(read_tokens(tokenizer_folders["old"]))
    with pytest.raises(
        InputError, match=rf"has id {size - 1} \('<\|im_end\|>'\), and the embedding {size - 1} rows.*vocab_size={size}"
    ):
        grow(tokenizer_folders["old"], tokenizer_folders["old"], size, size - 1)
    with pytest.raises(InputError, match="not this tokenizer's"):
        grow(tokenizer_folders["old"], tokenizer_folders["old"], size - 1, size)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no tokenizer\.json and no vocab\.json.*vocab_map"):
        growth_for(tmp_path / "empty", 500, tokenizer=tokenizer_folders["old"])


def test_an_explicit_map_says_where_each_row_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text("[3, null, [0, 4], 3]")
    parent = table(6, 5, np.dtype(np.float32))
    growth = growth_for(tmp_path, 6, vocab_map=file)
    assert growth is not None
    assert growth.size == 4
    assert growth.dropped == 3
    child = grown(growth, parent)
    assert np.array_equal(child[[0, 3]], parent[[3, 3]])
    assert np.allclose(child[1], parent[[0, 3, 4]].mean(axis=0))
    assert np.allclose(child[2], parent[[0, 4]].mean(axis=0))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "is not a list"), ("[]", "is not a list"), ("[1, 6]", "entry 1 is 6.*0 to 5"), ("[-1]", "entry 0 is -1"),
        ("[true]", "entry 0 is True"), ("[[]]", r"entry 0 is \[\]"), ("[[1, null]]", "entry 0"), ('["a"]', "entry 0 is 'a'"),
        ("[null]", "names no id"), ("[1, 2", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_map_that_is_none_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(InputError, match=says):
        read_vocab_map(tmp_path / "map.json", 6)


def test_a_map_of_another_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="has 2 entries and vocab_size=3"):
        growth_for(tmp_path, 6, vocab_size=3, vocab_map=tmp_path / "map.json")


def test_the_summary_counts_and_names(tokenizer_folders: dict[str, Path]) -> None:
    size = len(read_tokens(tokenizer_folders["other"]))
    growth = grow(tokenizer_folders["other"], tokenizer_folders["old"], size, 500)
    text = growth.summary()
    assert f"{size:,} -> 500 rows: {growth.moved} moved" in text
    assert f"{growth.averaged} averaged" in text
    assert f"{growth.filled} filled" in text
    assert f"{growth.dropped} of the parent's without a place" in text
    assert text.endswith(f" ({', '.join(map(repr, growth.dropped_names))}, ...)")
    assert len(growth.dropped_names) == 5


def test_a_token_keeps_its_own_row_beside_others_of_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = dict(enumerate([Token("<0x41>", b"A"), Token("A", b"A"), Token("<0x20>", b" "), Token("\u2581", b" ")]))
    monkeypatch.setattr(vocabulary, "read_tokens", lambda folder: tokens)
    monkeypatch.setattr(vocabulary, "splitter", lambda folder: None)
    assert grow(Path("same"), Path("same"), 4, 4).sources == (0, 1, 2, 3)
    renamed = dict(tokens) | {1: Token("Ā", b"A")}
    monkeypatch.setattr(vocabulary, "read_tokens", lambda folder: renamed if folder == Path("new") else tokens)
    assert grow(Path("same"), Path("new"), 4, 4).sources[1] == 0
