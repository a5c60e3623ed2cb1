"""Two models side by side: their configs key by key, and the sizes that follow from them. A view, not a check."""

from dataclasses import dataclass
from typing import Any

from moexpand.base.files import read_json
from moexpand.upcycle.checkpoint import EXPANSION
from moexpand.upcycle.count import BF16, TEXT, count
from moexpand.upcycle.family import Config
from moexpand.upcycle.models import Model


@dataclass(frozen=True)
class Diff:
    """What differs between two models, `left` and `right`.

    Attributes:
        keys: of config.json, nested ones joined by dots: those that differ, with the value of each side that has the key.
        equal: how many keys are equal.
        sizes: figures by name, left and right; None where a figure is unknown.
        descent: how one was made from the other, when the files say so.
    """

    keys: dict[str, dict[str, Any]]
    equal: int
    sizes: dict[str, tuple[int | None, int | None]]
    descent: "Descent | None"


@dataclass(frozen=True)
class Descent:
    """One side is an expansion of the other: its expansion.json records the other's fingerprint."""

    parent: str
    """`left` or `right`, as `child`."""
    child: str
    placement: str


def diff(left: Model, right: Model) -> Diff:
    """Compare two models by their configs and shapes; of folders, headers and vectors are read."""
    ours, theirs = flat(left.config), flat(right.config)
    keys = [*ours, *(key for key in theirs if key not in ours)]
    sides = {key: {side: config[key] for side, config in (("left", ours), ("right", theirs)) if key in config} for key in keys}
    different = {key: values for key, values in sides.items() if len(values) < 2 or values["left"] != values["right"]}
    here, there = sizes(left), sizes(right)
    return Diff(different, len(sides) - len(different), {name: (here[name], there[name]) for name in here}, _descent(left, right))


def flat(config: Config) -> dict[str, Any]:
    """A config's values by key, those of nested ones by keys joined with dots, as in `text_config.num_experts`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{inner}": item for inner, item in flat(value).items()}
        else:
            found[key] = value
    return found


def sizes(model: Model) -> dict[str, int | None]:
    """Figures that follow from a model's shapes, under the same names for every model: parameters, bytes, numbers of things."""
    arch, counted = model.architecture, count(model)
    return {
        **{part: counted.parts[part] for part in TEXT},
        **counted.subtotals,
        "total": counted.total,
        "active": counted.active,
        "active_without_embedding": counted.active_without_embedding,
        "buffers": counted.buffers,
        "per_expert": counted.per_expert,
        "experts_per_layer": arch.num_experts,
        "groups": arch.router_n_groups,
        "experts_per_token": arch.num_experts_per_tok,
        "layers": arch.num_hidden_layers,
        "layers_with_experts": len(arch.moe_layers),
        "hidden_size": arch.hidden_size,
        "vocabulary": arch.vocab_size,
        "tensors": len(model.shapes()),
        "bytes_bf16": counted.total * BF16,
        "bytes_stored": None if model.checkpoint is None else model.checkpoint.nbytes,
        # keys and values of every layer
        "kv_cache_bytes_per_token_bf16": 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * BF16,
    }


def ratio(pair: tuple[int | None, int | None]) -> float | None:
    """Right over left, or None where it has no value."""
    left, right = pair
    return None if not left or right is None else right / left


def _descent(left: Model, right: Model) -> Descent | None:
    sides = {"left": left.checkpoint, "right": right.checkpoint}
    for parent, child in (("left", "right"), ("right", "left")):
        from_, to = sides[parent], sides[child]
        if from_ is None or to is None or not (to.folder / EXPANSION).is_file():
            continue
        plan = read_json(to.folder / EXPANSION)
        if isinstance(plan, dict) and plan.get("parent") == from_.fingerprint:
            return Descent(parent, child, str(plan.get("placement")))
    return None
