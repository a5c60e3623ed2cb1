"""Placements: which parent each slot of a child copies.

Slots are contiguous in groups: group g of G holds the slots g*M ... (g + 1)*M - 1, M = slots / G. A placement cuts the E parents
into P parts of equal size, G / P times; group g holds part g mod P of cut g div P, every parent of it c = P r / G times, where
r = slots / E. So every parent gets r slots, in G / P groups. `usage` alone has no parts: its parents get different numbers.

Copies of one parent inside a group (c > 1) tie at step 0. Nearest to the parent is what shows few parents in a group and keeps
those that fire together apart; docs/expansion.md says what each placement computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.base.random import generator, raw_integers
from moexpand.upcycle.copies import copy_counts, deal
from moexpand.upcycle.spread import partition

FEW = 8
"""So many numbers of groups are listed in full when one does not fit."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a placement decides from; see `slot_map`."""

    parents: int
    slots: int
    groups: int
    parts: int
    layer: int
    seed: int
    affinity: np.ndarray | None
    popularity: np.ndarray | None


@dataclass(frozen=True)
class Placement:
    """How parents come into groups.

    Attributes:
        parts: P; 0 means one part a group, None that the placement does not cut the parents.
        members: parents of every group, int64 [G, M / c], ascending inside a group.
        most_groups: the largest number of groups for E parents, where there is one.
    """

    parts: int | None
    members: Callable[[Request], np.ndarray]
    most_groups: Callable[[int], int] | None = None


def slot_map(
    placement: str,
    parents: int,
    slots: int,
    groups: int,
    *,
    layer: int = 0,
    seed: int = 0,
    affinity: np.ndarray | None = None,
    popularity: np.ndarray | None = None,
) -> np.ndarray:
    """Parent of every slot of a layer.

    * `halves_tile`: the lower half of the parents in even groups, the upper half in odd ones.
    * `halves_bits`: group 2i holds the parents whose bit i is 0, group 2i + 1 those whose bit i is 1; when the bits that halve
      the parents evenly are used up, parities of several of them take the place of the bit.
    * `random_balanced`: every pair of groups is a random bisection.
    * `quarters`, `block`: contiguous parts, 4 or G of them. `full_copy`: every group holds all parents.
    * `quarters_spread`: groups 4k ... 4k + 3 are partition k into quarters that fire together rarely; partitions differ.
    * `block_spread`: one such partition into G parts.
    * `ranked`: parents by popularity, the most popular E / G in group 0, and so on. A negative control.
    * `usage`: copies in proportion to popularity, at most one of a parent in a group.

    Args:
        placement: a key of `PLACEMENTS`.
        parents: E.
        slots: experts of the child.
        groups: G.
        layer: index of the layer, which `random_balanced` draws for.
        seed: of `random_balanced`.
        affinity: [E, E] whole numbers, symmetric, any scale: how often two parents fire together. The `_spread` placements need
            it, `usage` makes use of it.
        popularity: [E], how often each parent is used; `ranked` and `usage` need it.

    Returns:
        int64 [slots]. Inside a group the parents ascend, and the whole list is repeated c times.

    Raises:
        InputError: an unknown placement, sizes that do not fit (the message names numbers of groups that do), or a placement
            without the statistics that it needs.
    """
    copies = check_fit(placement, parents, slots, groups)
    kind = PLACEMENTS[placement]
    if placement in NEEDS_AFFINITY and affinity is None:
        raise InputError(f"Placement {placement} needs to know which experts fire together; give it a calibration.")
    if placement in NEEDS_POPULARITY and popularity is None:
        raise InputError(
            f"Placement {placement} needs to know how often each expert is used; give it a calibration or a usage file."
        )
    for what, value, shape in (("affinity", affinity, (parents, parents)), ("popularity", popularity, (parents,))):
        if value is not None and np.shape(value) != shape:
            raise InputError(f"The {what} of layer {layer} has shape {np.shape(value)}, but {parents} experts need {shape}.")
    request = Request(
        parents=parents,
        slots=slots,
        groups=groups,
        parts=kind.parts or groups,
        layer=layer,
        seed=seed,
        affinity=affinity,
        popularity=popularity,
    )
    return np.tile(kind.members(request), (1, copies)).reshape(slots).astype(np.int64)


def check_fit(placement: str, parents: int, slots: int, groups: int, top_k: int | None = None) -> int:
    """Copies c of a parent inside a group that shows it.

    Args:
        placement: a key of `PLACEMENTS`.
        parents: E.
        slots: experts of the child, a multiple of E for all placements but `usage`.
        groups: G.
        top_k: K; when given, the message suggests only divisors of it.

    Raises:
        InputError: the sizes do not fit; the message names the nearest number of groups that does, and all if they are few.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"Placement {placement!r} is unknown; known are {', '.join(PLACEMENTS)}.")
    kind = PLACEMENTS[placement]
    if parents < 1 or slots < parents or (kind.parts is not None and slots % parents):
        raise InputError(f"{slots} experts are not a multiple of the parent's {parents}; choose num_experts accordingly.")
    copies = _copies(kind, parents, slots, groups)
    if copies:
        return copies
    more = ""
    if kind.parts is None:
        rule = (
            f"deals {slots} slots to groups of equal size, with at most one copy of each of {parents} experts in a group, "
            f"which {groups} groups do not allow"
        )
    elif kind.most_groups is not None and _copies(PLACEMENTS["random_balanced"], parents, slots, groups):
        most = kind.most_groups(parents)
        rule = f"halves {parents} experts in {most // 2} ways, one for each pair of groups, too few for {groups} groups"
        more = "; random_balanced takes any number of pairs"
    else:
        rule = _misfit(parents, slots // parents, groups, kind.parts or max(groups, 1))
    hint = suggestion(fitting_groups(placement, parents, slots, top_k), groups)
    raise InputError(f"Placement {placement} {rule}: {hint}{more}.")


def _misfit(parents: int, ratio: int, groups: int, parts: int) -> str:
    """Which of the numbers of a cut is not whole."""
    if parents % parts:
        return f"cuts {parents} experts into {parts} parts, which do not come out equal"
    if groups % parts:
        return f"shows each of {parts} parts in equally many groups, which {groups} groups do not allow"
    return f"would put {parts * ratio}/{groups} copies of an expert into a group, which must be a whole number of at least 1"


def fitting_groups(placement: str, parents: int, slots: int, top_k: int | None = None) -> list[int]:
    """All numbers of groups that fit a placement, ascending; with `top_k` only those that divide it."""
    kind = PLACEMENTS[placement]
    highest = slots if top_k is None else min(slots, top_k)
    return [
        groups
        for groups in range(1, highest + 1)
        if (top_k is None or top_k % groups == 0) and _copies(kind, parents, slots, groups)
    ]


def read_map(file: Path, layers: list[int], parents: int, slots: int) -> dict[int, np.ndarray]:
    """An explicit map from a JSON file, for every layer int64 [slots].

    The file holds one list of parents for all layers, a list of such lists in the order of `layers`, or an object with a list
    under the number of each layer.

    Raises:
        InputError: the file is no such thing, a number is not a parent, or a parent has no slot; the message names file, layer
            and slot.
    """
    maps = {}
    for layer, row in _rows_by_layer(file, layers).items():
        _check_length(file, layer, row, slots, "slots")
        for slot, parent in enumerate(row):
            if type(parent) is not int or not 0 <= parent < parents:
                raise InputError(
                    f"{file}: slot {slot} of layer {layer} copies {parent!r}, but experts are numbered 0 to {parents - 1}."
                )
        missing = sorted(set(range(parents)) - set(row))
        if missing:
            raise InputError(
                f"{file}: no slot of layer {layer} copies expert {missing[0]}; every expert of the parent needs one."
            )
        maps[layer] = np.array(row, dtype=np.int64)
    return maps


def read_usage(file: Path, layers: list[int], parents: int) -> dict[int, np.ndarray]:
    """How often each parent is used, from a JSON file of the same forms as a map: for every layer float64 [E].

    Raises:
        InputError: the file is no such thing, a number is negative or not finite, or all are 0; the message names file and layer.
    """
    usage = {}
    for layer, row in _rows_by_layer(file, layers).items():
        _check_length(file, layer, row, parents, "experts")
        for expert, value in enumerate(row):
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise InputError(
                    f"{file}: the usage of expert {expert} in layer {layer} is {value!r}, which is not a number from 0 up."
                )
        if not any(row):
            raise InputError(f"{file}: the usage of every expert in layer {layer} is 0, which gives no proportions.")
        usage[layer] = np.array(row, dtype=np.float64)
    return usage


def _copies(kind: Placement, parents: int, slots: int, groups: int) -> int:
    """c, or 0 where the sizes do not fit."""
    if groups < 1:
        return 0
    if kind.parts is None:
        return int(slots % groups == 0 and slots <= parents * groups)
    parts = kind.parts or groups
    total = parts * (slots // parents)
    if parents % parts or groups % parts or total % groups:
        return 0
    if kind.most_groups is not None and groups > kind.most_groups(parents):
        return 0
    return total // groups


def suggestion(fitting: list[int], groups: int) -> str:
    """End of a sentence: numbers of groups that fit, and which of them is nearest to `groups`."""
    if not fitting:
        return "no number of groups fits"
    nearest = min(fitting, key=lambda count: (abs(count - groups), count))
    if len(fitting) == 1:
        return f"num_groups may be {nearest}"
    if len(fitting) <= FEW:
        return f"num_groups may be {', '.join(map(str, fitting))} (nearest: {nearest})"
    around = sorted(sorted(fitting, key=lambda count: (abs(count - groups), count))[:FEW])
    return f"num_groups may be {', '.join(map(str, around))}, and others (nearest: {nearest})"


def _contiguous(request: Request) -> np.ndarray:
    return np.tile(np.arange(request.parents).reshape(request.parts, -1), (request.groups // request.parts, 1))


def _bits(request: Request) -> np.ndarray:
    index = np.arange(request.parents)
    masks = _masks(request.parents)[: request.groups // 2]
    return np.stack([index[np.bitwise_count(index & mask) % 2 == side] for mask in masks for side in (0, 1)])


def _masks(parents: int) -> list[int]:
    """Sets of bits of the index whose parity halves the parents evenly, and each differently.

    These are all sets of the lowest bits that E is a multiple of: single bits first, then pairs, and so on, ascending.
    """
    bits = [1 << bit for bit in range(_even_bits(parents))]
    return [sum(chosen) for size in range(1, len(bits) + 1) for chosen in sorted(combinations(bits, size), key=sum)]


def _even_bits(parents: int) -> int:
    """Exponent of 2 in E."""
    return (parents & -parents).bit_length() - 1


def _random(request: Request) -> np.ndarray:
    draw = generator(request.seed, "placement", request.layer)
    # By sorted raw integers: numpy promises their stream for good, and not that of `permutation`.
    orders = [np.argsort(raw_integers(draw, request.parents), kind="stable") for _ in range(request.groups // request.parts)]
    pairs = [order.reshape(request.parts, -1) for order in orders]
    return np.sort(np.concatenate(pairs), axis=1)


def _spread(request: Request) -> np.ndarray:
    together = np.zeros((request.parents, request.parents), dtype=np.int64)
    rows = []
    for _ in range(request.groups // request.parts):
        part = partition(_given(request.affinity), request.parts, together)
        together += part[:, None] == part
        rows += [np.flatnonzero(part == number) for number in range(request.parts)]
    return np.stack(rows)


def _ranked(request: Request) -> np.ndarray:
    order = np.argsort(-_given(request.popularity).astype(np.float64), kind="stable")
    return np.sort(order.reshape(request.parts, -1), axis=1)


def _usage(request: Request) -> np.ndarray:
    counts = copy_counts(_given(request.popularity), request.slots, request.groups)
    return deal(counts, request.groups, request.affinity)


def _given(statistics: np.ndarray | None) -> np.ndarray:
    assert statistics is not None, "slot_map checks what a placement needs"
    return np.asarray(statistics)


def _rows_by_layer(file: Path, layers: list[int]) -> dict[int, list[Any]]:
    """The list of every layer, in any of the three forms of `read_map`."""
    value = read_json(file)
    if isinstance(value, dict):
        names = [str(layer) for layer in layers]
        if set(value) != set(names):
            odd = sorted(set(value) ^ set(names))[0]
            state = "is not a layer with experts" if odd in value else "is absent"
            raise InputError(f"{file}: layer {odd} {state}; the file must hold a list for each of the layers {_span(layers)}.")
        rows = [value[name] for name in names]
    elif isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        rows = value
        if len(rows) != len(layers):
            raise InputError(f"{file} holds {len(rows)} lists, but the parent has {len(layers)} layers with experts.")
    else:
        rows = [value] * len(layers)
    for layer, row in zip(layers, rows, strict=True):
        if not isinstance(row, list):
            raise InputError(f"{file}: layer {layer} is not a list of numbers.")
    return dict(zip(layers, rows, strict=True))


def _span(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) <= FEW else f"{layers[0]} ... {layers[-1]}"


def _check_length(file: Path, layer: int, row: list[Any], length: int, what: str) -> None:
    if len(row) != length:
        raise InputError(f"{file}: the list of layer {layer} has {len(row)} numbers, but there are {length} {what}.")


ONE_A_GROUP = 0

PLACEMENTS = {
    "quarters_spread": Placement(4, _spread),
    "block_spread": Placement(ONE_A_GROUP, _spread),
    "halves_bits": Placement(2, _bits, most_groups=lambda parents: 2 * ((1 << _even_bits(parents)) - 1)),
    "halves_tile": Placement(2, _contiguous),
    "random_balanced": Placement(2, _random),
    "quarters": Placement(4, _contiguous),
    "block": Placement(ONE_A_GROUP, _contiguous),
    "full_copy": Placement(1, _contiguous),
    "ranked": Placement(ONE_A_GROUP, _ranked),
    "usage": Placement(None, _usage),
}
NEEDS_AFFINITY = {"quarters_spread", "block_spread"}
NEEDS_POPULARITY = {"ranked", "usage"}
