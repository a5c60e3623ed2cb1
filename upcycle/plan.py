"""The recipe of an expansion: a plan, its JSON, and what it says about every tensor of the child."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from moexpand.base.errors import InputError
from moexpand.upcycle.architecture import Architecture
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.families import Family, expected_tensors, expert_name, family_of, router_name
from moexpand.upcycle.placement import slot_map

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An expansion of one parent; equal plans of equal parents give the same bytes."""

    version: int = VERSION
    parent: str
    """Fingerprint of the parent, see `fingerprint`."""
    num_experts: int
    num_groups: int
    placement: str
    seed: int = 0
    router_noise: float = 0.0
    expert_noise: float = 0.0
    slot_to_parent: tuple[tuple[int, ...], ...]
    """Parent expert of every slot, by layer."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"slot_to_parent": [list(row) for row in self.slot_to_parent]}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Plan":
        """From parsed JSON; anything that is not a plan of this version is an `InputError` that names `where`."""
        fields = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or set(value) != fields:
            raise InputError(f"{where} is not a plan: it must hold exactly {', '.join(sorted(fields))}.")
        if value["version"] != VERSION or value["router_noise"] or value["expert_noise"]:
            raise InputError(
                f"{where} is a plan of version {value['version']} or with noise; this program knows version {VERSION} without."
            )
        rows = value["slot_to_parent"]
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and all(type(slot) is int for slot in row) for row in rows
        ):
            raise InputError(f"{where}: slot_to_parent must be a list of whole numbers for every layer.")
        return cls(**value | {"slot_to_parent": tuple(tuple(row) for row in rows)})


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one tensor of the child comes about: a copy of the parent's tensor `source`, or rows of it in a new order."""

    source: str
    rows: tuple[int, ...] | None = None


def fingerprint(parent: Checkpoint) -> str:
    """What tells one parent from another without reading its matrices.

    SHA-256 over config.json, every tensor's name, dtype and shape, and the bytes of all vectors (the norms, which differ
    between any two training runs).
    """
    digest = hashlib.sha256(json.dumps(parent.config, sort_keys=True).encode())
    for name, info in sorted(parent.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        if len(info.shape) == 1:
            digest.update(parent.read_bytes(name))
    return f"sha256:{digest.hexdigest()}"


def make_plan(parent: Checkpoint, *, num_experts: int, num_groups: int, placement: str, seed: int = 0) -> Plan:
    """Plan the expansion of `parent` to `num_experts` experts a layer in `num_groups` groups, the same map in every layer.

    Raises:
        InputError: the parent cannot be expanded this way, or the sizes do not fit; the message says which.
    """
    arch = parent.architecture
    if arch.router_n_groups != 1:
        raise InputError(
            f"{parent.folder} already routes in {arch.router_n_groups} groups; only a parent without groups can be expanded."
        )
    if not arch.norm_topk_prob:
        raise InputError(
            f"{parent.folder} has norm_topk_prob=false: copies would shrink the experts' output "
            f"{num_experts // arch.num_experts}-fold; only parents that renormalise can be expanded."
        )
    if num_groups < 1 or arch.num_experts_per_tok % num_groups:
        raise InputError(
            f"num_groups={num_groups} does not divide top-{arch.num_experts_per_tok}; every group must get as many choices."
        )
    row = tuple(slot_map(placement, arch.num_experts, num_experts, num_groups).tolist())
    return Plan(
        parent=fingerprint(parent),
        num_experts=num_experts,
        num_groups=num_groups,
        placement=placement,
        seed=seed,
        slot_to_parent=(row,) * arch.num_hidden_layers,
    )


def child_architecture(arch: Architecture, plan: Plan) -> Architecture:
    """Shape of the child of a parent of shape `arch`."""
    return replace(
        arch, model_type=family_of(arch.model_type).child, num_experts=plan.num_experts, router_n_groups=plan.num_groups
    )


def recipes(arch: Architecture, plan: Plan) -> dict[str, Recipe]:
    """The recipe of every tensor of the child, in the order of the model.

    Args:
        arch: the parent's shape.
        plan: its expansion.

    Raises:
        InputError: the plan's map does not fit the parent.
    """
    _check_map(arch, plan)
    family = family_of(arch.model_type)
    special = dict(_expanded(family, plan))
    return {name: special.get(name, Recipe(name)) for name in expected_tensors(child_architecture(arch, plan))}


def _expanded(family: Family, plan: Plan) -> Iterator[tuple[str, Recipe]]:
    for layer, parents in enumerate(plan.slot_to_parent):
        yield router_name(family, layer), Recipe(router_name(family, layer), parents)
        for slot, parent in enumerate(parents):
            for matrix in family.expert:
                yield expert_name(family, layer, slot, matrix), Recipe(expert_name(family, layer, parent, matrix))


def _check_map(arch: Architecture, plan: Plan) -> None:
    if len(plan.slot_to_parent) != arch.num_hidden_layers:
        raise InputError(f"The plan maps {len(plan.slot_to_parent)} layers, but the parent has {arch.num_hidden_layers}.")
    for layer, row in enumerate(plan.slot_to_parent):
        if len(row) != plan.num_experts or not all(0 <= parent < arch.num_experts for parent in row):
            raise InputError(
                f"The plan's map of layer {layer} is not {plan.num_experts} numbers from 0 to {arch.num_experts - 1}."
            )
        if len(set(row)) != arch.num_experts:
            missing = min(set(range(arch.num_experts)) - set(row))
            raise InputError(f"The plan's map of layer {layer} drops expert {missing} of the parent.")


def row_per_line(value: dict[str, Any]) -> str:
    """JSON with one line for each item of nested lists and dicts: as easy to read as to compare, and a third of the size."""
    parts = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            text = "{\n" + ",\n".join(f"    {json.dumps(name)}: {json.dumps(inner)}" for name, inner in item.items()) + "\n  }"
        elif isinstance(item, list) and item:
            text = "[\n" + ",\n".join(f"    {json.dumps(inner)}" for inner in item) + "\n  ]"
        else:
            text = json.dumps(item)
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
