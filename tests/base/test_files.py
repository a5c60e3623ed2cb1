"""Files are whole or absent, and a full disk is a sentence with exit code 3."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from moexpand.base.errors import ENVIRONMENT, WRONG_INPUT, EnvironmentFailure, InputError
from moexpand.base.files import disk_errors, new_folder, read_json, refuse_inside, sha256, write_atomic, write_json


def _full(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_atomic(path, "old")
    write_json(path, {"name": "größer"})
    assert read_json(path) == {"name": "größer"}
    assert [each.name for each in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "value.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, failing, _full)
    with pytest.raises(EnvironmentFailure, match=rf"disk is full while writing {path}") as caught:
        write_atomic(path, "new")
    assert caught.value.exit_code == ENVIRONMENT
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["value.json"]


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target) as building:
        (building / "inner").mkdir()
        (building / "inner" / "file").write_text("content")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "content"
    assert [each.name for each in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_no_folder_behind(tmp_path: Path, failure: BaseException) -> None:
    expected = EnvironmentFailure if isinstance(failure, OSError) else type(failure)

    def fail() -> None:
        with new_folder(tmp_path / "target") as building:
            (building / "file").write_text("half")
            raise failure

    with pytest.raises(expected):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_does_not_get_in(tmp_path: Path) -> None:
    with new_folder(tmp_path / "target") as left:
        pass
    (tmp_path / "target").rmdir()
    left.mkdir()
    (left / "stale").write_text("stale")
    with new_folder(tmp_path / "target") as building:
        (building / "fresh").write_text("fresh")
    assert [each.name for each in (tmp_path / "target").iterdir()] == ["fresh"]


def test_an_existing_target_is_refused_and_an_empty_one_filled(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    empty.mkdir()
    file.write_text("mine")
    for target in (full, file):
        with pytest.raises(InputError, match=f"{target} exists already") as caught, new_folder(target):
            pytest.fail("the body must not run")
        assert caught.value.exit_code == WRONG_INPUT
    with new_folder(empty) as building:
        (building / "new").write_text("new")
    assert (empty / "new").exists()
    assert (full / "mine").read_text() == file.read_text() == "mine"


def test_other_disk_errors_name_what_was_done_and_where(tmp_path: Path) -> None:
    words = rf"No such file or directory while copying \({tmp_path / 'gone'}\)\."
    with pytest.raises(EnvironmentFailure, match=words), disk_errors("copying"):
        (tmp_path / "gone").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON")]
)
def test_a_missing_or_broken_json_file_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_checksums_are_sha256_of_all_bytes(tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 9 + b"end"  # longer than one read
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_target_inside_its_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    refuse_inside(tmp_path / "source-2", source)
    refuse_inside(tmp_path, source)
    for target in (source, source / "deep" / "target", tmp_path / "link" / "target", source / ".." / "source" / "target"):
        with pytest.raises(InputError, match="lies in the source"):
            refuse_inside(target, source)
