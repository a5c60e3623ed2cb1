"""The plan of an expansion: everything that the child's bytes follow from besides the parent's, as JSON to read and to keep."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.family import EXPERT, FUSED, SPLIT
from moexpand.upcycle.inits import Init, check_visible
from moexpand.upcycle.vocabulary import Growth

VERSION = 3

PARENT_GROUPS = "parent_groups"
"""Key of expansion.json: in how many groups the parent routes, which the plan alone does not always tell."""

REMARKS = ("prediction", "warnings", "output", "checksum", PARENT_GROUPS)
"""Beginnings of the keys of a plan's file that the child does not follow from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An expansion of one parent; equal plans of equal parents give the same bytes."""

    version: int = VERSION
    parent: str
    """Fingerprint of the parent, see `Checkpoint.fingerprint`."""
    num_experts: int
    num_groups: int
    placement: str
    calibration: str | None = None
    """Digest of the calibration that the placement was computed from."""
    usage: str | None = None
    """Digest of the usage file that the placement was computed from."""
    seed: int = 0
    init: str = "copy"
    drop_fraction: float = 0.5
    drop_shared: bool = True
    keep_first: bool = True
    router_noise: float = 0.0
    expert_noise: float = 0.0
    router_dtype: str = "same"
    experts_layout: str = SPLIT
    vocabulary: Growth | None = None
    """Where the rows of embedding and head come from, when the child has another vocabulary."""
    slot_to_parent: tuple[tuple[int, ...], ...]
    """Parent expert of every slot, by layer; empty for a layer without experts."""

    @property
    def settings(self) -> Init:
        """The part that says how copies differ from their parents."""
        return Init(
            kind=self.init,
            drop_fraction=self.drop_fraction,
            drop_shared=self.drop_shared,
            keep_first=self.keep_first,
            router_noise=self.router_noise,
            expert_noise=self.expert_noise,
            seed=self.seed,
        )

    @property
    def digest(self) -> str:
        """Of everything that the child follows from: equal for plans that make the same child of the same parent."""
        return f"sha256:{hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()}"

    def words(self) -> str:
        """The plan in one line, without the map."""
        drop = f"drop {self.drop_fraction:g}" if self.init == "drop" else "copies"
        noise = f"router noise {self.router_noise:g}, expert noise {self.expert_noise:g}"
        return f"{self.num_experts} experts in {self.num_groups} groups, {self.placement}; {drop}, {noise}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_json(),
            "slot_to_parent": [list(row) for row in self.slot_to_parent],
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Plan":
        """From parsed JSON; anything that is not a plan of this version is an `InputError` that names `where`."""
        if not isinstance(value, dict):
            raise InputError(f"{where} is not a plan: it is no JSON object.")
        value = {key: item for key, item in value.items() if not key.startswith(REMARKS)}
        if value.get("version") != VERSION:
            raise InputError(f"{where} is a plan of version {value.get('version')}; this program knows version {VERSION}.")
        if set(value) != {field.name for field in fields(cls)}:
            wrong = sorted(set(value) ^ {field.name for field in fields(cls)})
            raise InputError(f"{where} is not a plan: {', '.join(wrong)} is missing or unknown.")
        rows = value["slot_to_parent"]
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and all(type(slot) is int for slot in row) for row in rows
        ):
            raise InputError(f"{where}: slot_to_parent must be a list of whole numbers for every layer.")
        for key, allowed in _ALLOWED.items():
            if not isinstance(value[key], allowed) or (isinstance(value[key], bool) and bool not in allowed):
                raise InputError(f"{where} is not a plan: {key}={value[key]!r}.")
        for key, words in (("experts_layout", (SPLIT, FUSED)), ("router_dtype", ("same", "float32")), ("init", ("copy", "drop"))):
            if value[key] not in words:
                raise InputError(f"{where} is not a plan: {key}={value[key]!r}, not {' or '.join(words)}.")
        growth = None if value["vocabulary"] is None else Growth.from_json(value["vocabulary"], where)
        return cls(**value | {"slot_to_parent": tuple(tuple(row) for row in rows), "vocabulary": growth})


_ALLOWED: dict[str, tuple[type, ...]] = {
    "parent": (str,),
    "num_experts": (int,),
    "num_groups": (int,),
    "placement": (str,),
    "calibration": (str, type(None)),
    "usage": (str, type(None)),
    "seed": (int,),
    "drop_fraction": (int, float),
    "drop_shared": (bool,),
    "keep_first": (bool,),
    "router_noise": (int, float),
    "expert_noise": (int, float),
}


def read_plan(file: Path) -> Plan:
    """Read a plan from a file that `plan_out` or an expansion (`expansion.json`) wrote."""
    return Plan.from_json(read_json(file), str(file))


def check_plan(parent: Checkpoint, plan: Plan, where: str = "The plan") -> None:
    """Refuse a plan that is not of this parent or that contradicts itself, with an `InputError` that says how."""
    arch = parent.architecture
    if plan.parent != parent.fingerprint:
        raise InputError(f"{where} is for another parent than {parent.folder}: the fingerprints differ.")
    try:
        check_settings(parent, plan)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if len(plan.slot_to_parent) != arch.num_hidden_layers:
        raise InputError(f"{where} maps {len(plan.slot_to_parent)} layers, but the parent has {arch.num_hidden_layers}.")
    for layer, row in enumerate(plan.slot_to_parent):
        if layer not in arch.moe_layers:
            if row:
                raise InputError(f"{where} maps layer {layer}, which has no experts.")
            continue
        if len(row) != plan.num_experts or not all(0 <= parent < arch.num_experts for parent in row):
            raise InputError(
                f"{where}'s map of layer {layer} is not {plan.num_experts} numbers from 0 to {arch.num_experts - 1}."
            )
        if len(set(row)) != arch.num_experts:
            missing = min(set(range(arch.num_experts)) - set(row))
            raise InputError(f"{where}'s map of layer {layer} drops expert {missing} of the parent.")
        _check_groups_kept(parent, plan, layer, where)


def check_settings(parent: Checkpoint, plan: Plan) -> None:
    """Refuse numbers that the child of this parent cannot have, whatever its map, with an `InputError` that says how."""
    arch = parent.architecture
    if not arch.norm_topk_prob:
        raise InputError(
            f"{parent.folder} has norm_topk_prob=false: copies would shrink the experts' output "
            f"{plan.num_experts / arch.num_experts:g}-fold; only parents that renormalise can be expanded."
        )
    check_number_of_groups(parent, plan.num_groups)
    top_k = arch.num_experts_per_tok
    if plan.num_groups < 1 or top_k % plan.num_groups or plan.num_experts % plan.num_groups:
        raise InputError(
            f"num_groups={plan.num_groups} does not divide both top-{top_k} and num_experts={plan.num_experts}; every group "
            "needs as many choices and as many experts."
        )
    vocabulary = plan.vocabulary
    if vocabulary is not None and vocabulary.parent_size != arch.vocab_size:
        raise InputError(
            f"the vocabulary grows from {vocabulary.parent_size} rows, but {parent.folder} has {arch.vocab_size}; plan anew."
        )
    router = parent.tensors[parent.family.router_name(arch.moe_layers[0])].dtype
    router = "F32" if plan.router_dtype == "float32" else router
    for matrix in EXPERT:
        check_visible(plan.settings, router, parent.dtypes[matrix])


def check_number_of_groups(parent: Checkpoint, number: int) -> None:
    """Refuse another number of groups than that of a parent that was trained with groups."""
    groups = parent.architecture.router_n_groups
    if groups not in (1, number):
        raise InputError(f"{parent.folder} routes in {groups} groups already; its child must have num_groups={groups} as well.")


def _check_groups_kept(parent: Checkpoint, plan: Plan, layer: int, where: str) -> None:
    """A parent that was trained with groups keeps every expert in its own: elsewhere it would meet other rivals."""
    groups = parent.architecture.router_n_groups
    if groups == 1:
        return
    own, new = parent.architecture.num_experts // groups, plan.num_experts // groups
    for slot, expert in enumerate(plan.slot_to_parent[layer]):
        if slot // new != expert // own:
            raise InputError(
                f"{where} puts expert {expert} of layer {layer} into group {slot // new}, but {parent.folder} was trained with "
                f"it in group {expert // own}; give placement=block, which keeps every expert in its group."
            )


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
