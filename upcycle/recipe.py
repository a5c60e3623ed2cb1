"""How every tensor of a child comes about, by a parent and a plan.

Writer, proof and loading without a child folder all go through `Recipe`: the first two take its jobs, which put bytes into stored
tensors; the last reads the tensors as the model means them, one matrix of one expert at a time.

Legend: E experts of the parent, S slots (experts of the child), H hidden, I intermediate, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.upcycle import vocabulary
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import NUMPY, Checkpoint
from moexpand.upcycle.config_json import grouped_config, with_vocabulary
from moexpand.upcycle.families import family_of
from moexpand.upcycle.family import EXPERT, FUSED, SPLIT, Config, stack_of, with_scales
from moexpand.upcycle.inits import changes_experts, expert_matrix, router_rows
from moexpand.upcycle.jobs import Bundle, Job, Made, Place, Read, Stream, Task
from moexpand.upcycle.layout import Layout
from moexpand.upcycle.matrices import check_conversion, matrix_range, read_matrix, stored_unit
from moexpand.upcycle.plan import Plan, check_plan
from moexpand.upcycle.safetensors_file import Shape, nbytes
from moexpand.upcycle.tensors import matrix_shape, stacks, stored_tensors
from moexpand.upcycle.tokenizer_files import tokenizer_files

VOCABULARY_PIECE = 8 << 20


class Recipe:
    """The child of `parent` by `plan`.

    Args:
        parent: opened.
        plan: made for this parent.
        where: where the plan came from, for messages.
        tokenizer: folder of the child's tokenizer, when the plan gives it another vocabulary.

    Raises:
        InputError: the plan is for another parent or contradicts itself.
    """

    def __init__(self, parent: Checkpoint, plan: Plan, where: str = "The plan", tokenizer: Path | None = None) -> None:
        check_plan(parent, plan, where)
        check_conversion(parent, plan.experts_layout)
        self.parent, self.plan, self.tokenizer = parent, plan, tokenizer
        self.layouts: dict[int, Layout] = {}
        self.family = family_of(parent.family.child)
        self.matrices = with_scales(EXPERT, parent.quantised)

    @cached_property
    def architecture(self) -> Architecture:
        """Shape of the child's decoder."""
        arch = self.parent.architecture
        return replace(
            arch,
            model_type=self.family.model_type,
            num_experts=self.plan.num_experts,
            router_n_groups=self.plan.num_groups,
            vocab_size=arch.vocab_size if self.plan.vocabulary is None else self.plan.vocabulary.size,
            # the tokens of pictures and series may have other ids
            vision=self.family.vision(self.config, str(self.parent.folder)),
            time_series=self.family.time_series(self.config, str(self.parent.folder)),
        )

    @cached_property
    def config(self) -> Config:
        """The child's config.json; ids of special tokens move with their rows."""
        config = grouped_config(self.parent.config, self.plan.num_experts, self.plan.num_groups)
        if self.plan.vocabulary is None:
            return config
        moved = {source: new for new, source in enumerate(self.plan.vocabulary.sources) if isinstance(source, int)}
        return with_vocabulary(config, self.plan.vocabulary.size, moved)

    @cached_property
    def kept_side_files(self) -> list[Path]:
        """The parent's side files that the child has too: all, but for a tokenizer that it has one of its own for."""
        if self.plan.vocabulary is None:
            return list(self.parent.side_files)
        replaced = set(tokenizer_files(self.parent.folder))
        return [file for file in self.parent.side_files if file not in replaced]

    @cached_property
    def own_side_files(self) -> list[Path]:
        """Files of the child's own tokenizer, relative to its folder."""
        if self.plan.vocabulary is None or self.tokenizer is None:
            return []
        return tokenizer_files(self.tokenizer)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Stored dtype and shape of every tensor of the child, in the order of the model."""
        shapes = stored_tensors(self.architecture, self.plan.experts_layout, self.parent.quantised)
        found = {name: (self._dtype(name), shape) for name, shape in shapes.items()}
        return found | {name: (info.dtype, info.shape) for name, info in self.parent.tensors.items() if name in self._carried}

    @cached_property
    def _carried(self) -> set[str]:
        """Tensors of the parent beside its decoder."""
        decoder = stored_tensors(
            self.parent.architecture, self.parent.experts_layout, self.parent.quantised, self.parent.transposed
        )
        return {name for name in self.parent.tensors if name not in decoder}

    def _dtype(self, name: str) -> str:
        _, experts, ending = name.partition(".mlp.experts.")
        if experts:
            matrix = ending.partition(".")[2] if ending[0].isdigit() else stacks(self.matrices)[ending][0]
            return self.parent.dtypes[matrix]
        if name in self._routers and self.plan.router_dtype == "float32":
            return "F32"
        return self.parent.tensors[name].dtype

    @cached_property
    def _routers(self) -> dict[str, int]:
        return {self.family.router_name(layer): layer for layer in self.architecture.moe_layers}

    # ------------------------------------------------------------ tensors as the model means them

    def exact(self, layer: int) -> np.ndarray:
        """Bool [S]: which slots are exact copies, router row and all: the first of every parent, where the plan keeps it."""
        parents = np.array(self.plan.slot_to_parent[layer])
        first = np.zeros(len(parents), dtype=bool)
        first[np.unique(parents, return_index=True)[1]] = self.plan.keep_first
        return first

    def router(self, layer: int, read: Read | None = None) -> np.ndarray:
        """Router rows [S, H] in their stored dtype."""
        name = self.family.router_name(layer)
        rows = self.parent.read_numpy(name, read=read)[list(self.plan.slot_to_parent[layer])]
        return router_rows(rows, self.plan.settings, layer, self.exact(layer), NUMPY[self._dtype(name)])

    def matrix(self, layer: int, slot: int, matrix: str, read: Read | None = None) -> np.ndarray:
        """A matrix of a slot's expert (a key of `EXPERT`, or its scales), [out, in]; not to be written to.

        Args:
            read: brings the bytes of the slot's parent.
        """
        copied = read_matrix(self.parent, layer, self.plan.slot_to_parent[layer][slot], matrix, read)
        if matrix not in EXPERT or not changes_experts(self.plan.settings) or self.exact(layer)[slot]:
            return copied
        return expert_matrix(copied, matrix, self.plan.settings, layer, slot)

    def vocabulary_rows(self, name: str, start: int, stop: int, read: Read | None = None) -> np.ndarray:
        """Rows [start, stop) of embedding or head, of a child with a vocabulary of its own."""
        assert self.plan.vocabulary is not None
        read_rows = partial(_read_rows, self.parent, name, read)
        if name not in self._means:  # what tokens without an ancestor get
            self._means[name] = vocabulary.mean_row(self.plan.vocabulary, read_rows)
        return vocabulary.rows(self.plan.vocabulary, read_rows, self._means[name], start, stop)

    @cached_property
    def _means(self) -> dict[str, Any]:
        return {}

    # ------------------------------------------------------------ tensors as files store them

    def bundles(self) -> Iterator[Bundle]:
        """All jobs of the child, in the order of the model."""
        done: set[str] = set()
        for name in self.tensors:
            if name in done:
                continue
            layer = self._layer_of_experts(name)
            for bundle in [self._single(name)] if layer is None else self._experts(layer):
                done.update(bundle.tensors)
                yield bundle

    def _layer_of_experts(self, name: str) -> int | None:
        head, experts, _ = name.partition(".mlp.experts.")
        return int(head.rpartition(".")[2]) if experts else None

    def _single(self, name: str) -> Bundle:
        """A tensor that no other shares bytes with."""
        dtype, shape = self.tensors[name]
        content: Stream | Made = Stream(name, 0, nbytes(dtype, shape))
        origin = f"the parent's {name}"
        if name in self._routers:
            content = Made(content.nbytes, partial(self._router_pieces, self._routers[name]))
            origin = f"the plan's rows of the parent's {name}"
        elif self.plan.vocabulary is not None and name in (self.family.embedding_name(), self.family.head):
            content = Made(content.nbytes, partial(self._vocabulary_pieces, name))
            origin = f"the plan's rows of the parent's {name}"
        return Bundle((name,), ((Job(content, (Place(name, 0),), origin),),))

    def _router_pieces(self, layer: int, read: Read) -> Iterator[memoryview]:
        yield as_bytes(self.router(layer, read))

    def _vocabulary_pieces(self, name: str, read: Read) -> Iterator[memoryview]:
        dtype, (rows, width) = self.tensors[name]
        step = max(1, VOCABULARY_PIECE // nbytes(dtype, (width,)))
        for start in range(0, rows, step):
            yield as_bytes(self.vocabulary_rows(name, start, min(start + step, rows), read))

    def _experts(self, layer: int) -> Iterator[Bundle]:
        """One bundle for each expert of the parent with all its copies; in fused files one for each of the layer's stacks."""
        parents = np.array(self.plan.slot_to_parent[layer])
        slots = [np.flatnonzero(parents == expert).tolist() for expert in range(self.parent.architecture.num_experts)]
        if self.plan.experts_layout == FUSED:
            for stack, matrices in stacks(self.matrices).items():
                tasks = (task for expert, own in enumerate(slots) for task in self._tasks(layer, expert, own, matrices))
                yield Bundle((self.family.stack_name(layer, stack),), tuple(tasks))
            return
        for expert, own in enumerate(slots):
            names = tuple(self.family.expert_name(layer, slot, matrix) for slot in own for matrix in self.matrices)
            tasks = (task for stack in stacks(self.matrices).values() for task in self._tasks(layer, expert, own, stack))
            yield Bundle(names, tuple(tasks))

    def _tasks(self, layer: int, expert: int, slots: list[int], stack: tuple[str, ...]) -> Iterator[Task]:
        """What makes a stack's matrices of an expert of the parent, and all its copies.

        The pieces of the child that lie in the parent's file as one run of bytes are one task.
        """
        pieces = [stack] if self._transposed else [(matrix,) for matrix in stack]
        jobs = [tuple(self._expert_jobs(layer, expert, slots, piece)) for piece in pieces]
        yield from [tuple(chain.from_iterable(jobs))] if self.parent.transposed else jobs

    def _expert_jobs(self, layer: int, expert: int, slots: list[int], piece: tuple[str, ...]) -> Iterator[Job]:
        """A piece of an expert of the parent: copies as one job, slots that differ from each other as one job each."""
        kept = self.exact(layer)
        copies = [slot for slot in slots if kept[slot] or not changes_experts(self.plan.settings)]
        if copies:
            content = self._copied(layer, expert, piece) if len(copies) == len(slots) else None
            origin = f"the parent's {' and '.join(piece)} of expert {expert} in layer {layer}"
            places = tuple(self._place(layer, slot, piece) for slot in copies)
            yield Job(content or self._made(layer, copies[0], piece), places, origin)
        for slot in slots:
            if slot not in copies:
                place = self._place(layer, slot, piece)
                yield Job(self._made(layer, slot, piece), (place,), f"the plan's slot {slot} of layer {layer}")

    def _made(self, layer: int, slot: int, piece: tuple[str, ...]) -> Made:
        return Made(self._piece_bytes(piece), partial(self._unit_pieces, layer, slot, piece))

    @property
    def _transposed(self) -> bool:
        """Whether the child's stacks are [S, in, out]; they are written as on the hub, which is what the model code reads."""
        return self.plan.experts_layout == FUSED and self.family.transposed

    @property
    def largest_range(self) -> int:
        """Bytes of the largest run of an expert's matrices that is read from the parent at once."""
        runs = list(stacks(self.matrices).values()) if self.parent.transposed else [(matrix,) for matrix in self.matrices]
        return max(map(self._piece_bytes, runs))

    def _piece_bytes(self, piece: tuple[str, ...]) -> int:
        return sum(nbytes(self.parent.dtypes[matrix], matrix_shape(self.architecture, matrix)) for matrix in piece)

    def _copied(self, layer: int, expert: int, piece: tuple[str, ...]) -> Stream | None:
        """Where the parent's files hold a piece as the same run of bytes, if they do."""
        if self._transposed != self.parent.transposed:
            return None
        found = matrix_range(self.parent, expert, piece)
        return None if found is None else Stream(self.parent.matrix_name(layer, expert, piece[0]), *found)

    def _place(self, layer: int, slot: int, piece: tuple[str, ...]) -> Place:
        if self.plan.experts_layout == SPLIT:
            return Place(self.family.expert_name(layer, slot, piece[0]), 0)
        stack = stacks(self.matrices)[stack_of(piece[0])]
        unit = sum(self._piece_bytes((matrix,)) for matrix in stack)
        before = sum(self._piece_bytes((matrix,)) for matrix in stack[: stack.index(piece[0])])
        return Place(self.family.stack_name(layer, stack_of(piece[0])), slot * unit + before)

    def _unit_pieces(self, layer: int, slot: int, piece: tuple[str, ...], read: Read) -> Iterator[memoryview]:
        matrices = [self.matrix(layer, slot, matrix, read) for matrix in piece]
        yield as_bytes(stored_unit(matrices, self._transposed))


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array; no copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_rows(parent: Checkpoint, name: str, read: Read | None, first: int, last: int) -> np.ndarray:
    return parent.read_numpy(name, slice(first, last), read)
