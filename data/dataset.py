"""A folder of shards opened for reading: dataset.json, every index, random access to texts, and the count of bad samples."""

from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.data.index import read_index
from moexpand.data.shards import ShardReader

SUMMARY = "dataset.json"
FORMAT_VERSION = 1


def read_summary(folder: Path) -> dict[str, Any]:
    """dataset.json of a shard folder.

    Raises:
        InputError: the folder or the file is missing, damaged or of another version.
    """
    folder = Path(folder)
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder} is not a folder of shards: it has no {SUMMARY}; write one with `moexpand data build`.")
    summary = read_json(folder / SUMMARY)
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{folder / SUMMARY} has the format version {version}; this program reads {FORMAT_VERSION}.")
    return summary


class Corpus:
    """All samples of a shard folder, numbered from 0 in the order of dataset.json.

    Attributes:
        tokens: int64 [N], ids of every sample's text, without the end-of-text token.
        key_hash: uint64 [N].
        bad: key of every unreadable sample met so far -> what is wrong with it.
    """

    def __init__(self, folder: Path, max_bad_fraction: float = 0.0) -> None:
        summary = read_summary(folder)
        self.folder = folder
        self.tokenizer_name: str = summary["tokenizer"]["name"]
        self.fingerprint: str = summary["tokenizer"]["fingerprint"]
        self.max_bad_fraction = max_bad_fraction
        self.bad: dict[str, str] = {}
        paths = [folder / shard["name"] for shard in summary["shards"]]
        self._readers = [ShardReader(path) for path in paths]
        indexes = [read_index(path) for path in paths]
        for path, index, shard in zip(paths, indexes, summary["shards"], strict=True):
            if index.tokenizer != self.fingerprint or len(index.key) != shard["samples"]:
                raise InputError(f"The index of {path} does not agree with {folder / SUMMARY}; build the shards again.")
        if not indexes or not sum(len(index.key) for index in indexes):
            raise InputError(f"{folder} holds no sample.")

        members = [index.texts() for index in indexes]
        self.shard = np.repeat(np.arange(len(indexes)), [len(index.key) for index in indexes])
        self.key = np.concatenate([index.key for index in indexes])
        self.key_hash = np.concatenate([index.key_hash for index in indexes])
        self.kind = np.concatenate([index.kind for index in indexes])
        self.tokens = np.concatenate([index.tokens for index in indexes])
        self._offset = np.concatenate([index.member_offset[m] for index, m in zip(indexes, members, strict=True)])
        self._size = np.concatenate([index.member_size[m] for index, m in zip(indexes, members, strict=True)])
        self._crc32 = np.concatenate([index.member_crc32[m] for index, m in zip(indexes, members, strict=True)])
        for i, (reader, index) in enumerate(zip(self._readers, indexes, strict=True)):
            self._check_size(i, reader, index.tar_size)

    def __len__(self) -> int:
        return len(self.key)

    def name(self, sample: int) -> str:
        """Shard file and key of a sample, for messages."""
        return f"{self._readers[self.shard[sample]].path}: {self.key[sample].decode()}"

    def text(self, sample: int) -> str | None:
        """Text of a sample, or None where it is unreadable and the allowed fraction is not yet passed.

        Raises:
            InputError: more samples are unreadable than `max_bad_fraction` allows.
        """
        reader = self._readers[self.shard[sample]]
        key = self.key[sample].decode()
        try:
            content = reader.read(key, "txt", int(self._offset[sample]), int(self._size[sample]), int(self._crc32[sample]))
            return content.decode()
        except InputError as error:
            self._count_bad(key, str(error))
        except UnicodeDecodeError:
            self._count_bad(key, f"The member {key}.txt of {reader.path} is not UTF-8.")
        return None

    def _check_size(self, number: int, reader: ShardReader, expected: int) -> None:
        """A shard of another size than its index says: samples beyond its end are bad, a longer one is another file."""
        size = reader.size()
        if size == expected:
            return
        if size > expected or self.max_bad_fraction == 0.0:
            state = "truncated" if size < expected else "another file"
            raise InputError(f"The shard {reader.path} has {size} bytes, and its index says {expected}: it is {state}.")
        for sample in np.flatnonzero((self.shard == number) & (self._offset + self._size > size)):
            key = self.key[sample].decode()
            self._count_bad(key, f"The shard {reader.path} ends before the member {key}.txt: it is truncated.")

    def _count_bad(self, key: str, problem: str) -> None:
        self.bad[key] = problem
        if len(self.bad) > self.max_bad_fraction * len(self):
            allowed = f"data.max_bad_fraction={self.max_bad_fraction} allows {int(self.max_bad_fraction * len(self))}"
            raise InputError(f"{problem} {len(self.bad)} of {len(self)} samples are unreadable, and {allowed}.")
