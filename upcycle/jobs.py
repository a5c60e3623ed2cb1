"""What the writer has to do, without knowing why: where bytes come from and every place of the child that they go to.

A child is a set of stored tensors, each of them a row of consecutive pieces. A `Job` makes one piece and puts it wherever the
child holds it; pieces that are equal by the recipe are one job, so that the parent is read once. A `Bundle` is a set of jobs that
share tensors with each other and with no other job; it goes into one file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


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
    """Bytes that are computed; `pieces()` gives them in order, the same ones at every call, and may be called from any thread."""

    nbytes: int
    pieces: Callable[[], Iterator[memoryview]]


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


@dataclass(frozen=True, slots=True)
class Bundle:
    """Jobs that together make these tensors, and no other jobs do."""

    tensors: tuple[str, ...]
    jobs: tuple[Job, ...]
