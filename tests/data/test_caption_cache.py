"""Answers stay through kills, torn tails and changed bytes, and one run at a time writes them."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from moexpand.base.errors import InputError
from moexpand.data.caption_cache import AnswerCache, Reply


def test_a_second_run_on_a_cache_in_use_is_refused_and_other_files_are_too(tmp_path):
    file = tmp_path / "captions.sqlite"
    with AnswerCache(file) as cache:
        cache.put(b"k", "m", Reply("t", "stop", 1, 2))
        with pytest.raises(InputError, match="in use by another run"):
            AnswerCache(file)
    with AnswerCache(file) as cache:
        assert cache.get(b"k") == Reply("t", "stop", 1, 2)
        assert cache.get(b"other") is None
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to have the header of one " * 20)
    with pytest.raises(InputError, match="not a cache of answers"):
        AnswerCache(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE things (a)")
    base.close()
    with pytest.raises(InputError, match="another program"):
        AnswerCache(other)


def test_a_torn_tail_of_the_log_costs_its_last_answers_and_a_changed_text_is_asked_for_again(tmp_path):
    file = tmp_path / "captions.sqlite"
    fill = """
import os, sys
from pathlib import Path
from moexpand.data.caption_cache import AnswerCache, Reply
cache = AnswerCache(Path(sys.argv[1]))
for n in range(50):
    cache.put(b"%d" % n, "m", Reply(f"text {n} " * 50, "stop", 1, 2))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", fill, str(file)], cwd=Path(__file__).parents[2], check=False)
    log = tmp_path / "captions.sqlite-wal"
    os.truncate(log, log.stat().st_size - 3000)
    with AnswerCache(file) as cache:
        kept = [n for n in range(50) if cache.get(b"%d" % n)]
        assert 40 <= len(kept) < 50
        assert kept == list(range(len(kept)))
        cache.put(b"49", "m", Reply("again", "stop", 1, 2))
    with sqlite3.connect(file) as base:
        base.execute("UPDATE answers SET text = 'changed' WHERE key = ?", (b"0",))
    base.close()
    with AnswerCache(file) as cache:
        assert cache.get(b"0") is None
        assert cache.get(b"49") == Reply("again", "stop", 1, 2)
