"""What the writer has to do, without knowing why: where bytes come from and every place of the child that they go to.

A child is a set of stored tensors, each of them a row of consecutive pieces. A `Job` makes one piece and puts it wherever the
child holds it; pieces that are equal by the recipe are one job. Jobs that come from the same bytes of the parent are a task, done
by one thread, so that these are read once. A `Bundle` is a set of tasks that share tensors with each other and no other;
it goes into one file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

Read = Callable[[Path, int, int], memoryview]
"""Bytes [start, stop) of a file, not to be written to. Whoever does jobs brings it, and may keep what was read last."""


@dataclass(frozen=True, slots=True)
class Place:
    """`offset` bytes from the beginning of the child's tensor `tensor`."""

    tensor: str
    offset: int


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes [start, stop) of the parent's tensor `tensor`, as they are."""

    tensor: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes that are computed; `pieces(read)` gives them in order, the same ones at every call and in every thread."""

    nbytes: int
    pieces: Callable[[Read], Iterator[memoryview]]


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of the child and all its places.

    Attributes:
        origin: what it is, for messages: "the parent's model.norm.weight".
    """

    content: Stream | Made
    places: tuple[Place, ...]
    origin: str

    @property
    def nbytes(self) -> int:
        """Bytes of the piece, which each of the places gets."""
        return self.content.nbytes


Task = tuple[Job, ...]
"""Jobs that come from the same bytes of the parent."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tasks that together make these tensors, and no other tasks do."""

    tensors: tuple[str, ...]
    tasks: tuple[Task, ...]

    @property
    def jobs(self) -> Iterator[Job]:
        """The jobs of all tasks."""
        return chain.from_iterable(self.tasks)
