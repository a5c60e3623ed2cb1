"""Makes the plan of an expansion from what the user asks for: maps from slots to parents, sizes, settings, what to warn of."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path

import numpy as np

from moexpand.base.errors import InputError
from moexpand.base.files import read_json
from moexpand.upcycle import placement as placements
from moexpand.upcycle.calibration import Calibration
from moexpand.upcycle.checkpoint import Checkpoint
from moexpand.upcycle.inits import Init
from moexpand.upcycle.matrices import check_conversion
from moexpand.upcycle.plan import Plan, check_number_of_groups, check_plan, check_settings
from moexpand.upcycle.prediction import Prediction, predict
from moexpand.upcycle.spread import router_affinity
from moexpand.upcycle.vocabulary import Growth

OWN_MAP = 'a map of your own is a plan with "placement": "map"'

SPREAD_NOISE = 0.05
"""Default router noise of the `_spread` placements, which put equal copies into one group: without it only one is ever picked."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What an expansion is asked to be; see the keys of `moexpand upcycle`."""

    num_experts: int = 512
    num_groups: int = 8
    placement: str = "quarters_spread"
    calibration: Calibration | None = None
    map: Path | None = None
    usage: Path | None = None
    regroup: bool = False
    router_dtype: str = "same"
    experts_layout: str = "same"
    vocabulary: Growth | None = None
    init: Init = field(default_factory=Init)
    default_noise: bool = True
    """Router noise was not given: the placement decides."""


def make_plan(parent: Checkpoint, wishes: Wishes) -> Plan:
    """Plan the expansion of `parent`.

    Raises:
        InputError: the parent cannot be expanded this way, sizes do not fit, a file is missing, or the calibration is of another
            parent; the message says which.
    """
    _check_sizes(parent, wishes)
    _check_files(wishes)
    noise = wishes.init.router_noise
    if wishes.default_noise and wishes.placement in placements.NEEDS_AFFINITY:
        noise = SPREAD_NOISE
    name = parent.fingerprint
    check_calibration(parent, name, wishes.calibration)
    used = wishes.calibration is not None and wishes.placement in placements.NEEDS_AFFINITY | {"ranked", "usage"}
    plan = Plan(
        parent=name,
        num_experts=wishes.num_experts,
        num_groups=wishes.num_groups,
        placement=wishes.placement,
        calibration=wishes.calibration.digest if used and wishes.calibration is not None else None,
        usage=None if wishes.usage is None else _usage_digest(wishes.usage),
        seed=wishes.init.seed,
        init=wishes.init.kind,
        drop_fraction=wishes.init.drop_fraction,
        drop_shared=wishes.init.drop_shared,
        keep_first=wishes.init.keep_first,
        router_noise=noise,
        expert_noise=wishes.init.expert_noise,
        router_dtype=wishes.router_dtype,
        experts_layout=parent.experts_layout if wishes.experts_layout == "same" else wishes.experts_layout,
        vocabulary=wishes.vocabulary,
        slot_to_parent=(),
    )
    check_conversion(parent, plan.experts_layout)
    check_settings(parent, plan)
    plan = replace(plan, slot_to_parent=_maps(parent, wishes))
    check_plan(parent, plan)
    return plan


def check_calibration(parent: Checkpoint, name: str, calibration: Calibration | None) -> None:
    """Refuse a calibration of another parent than `parent`, whose fingerprint is `name`."""
    if calibration is not None and calibration.parent != name:
        raise InputError(f"{calibration.folder} was made with another parent than {parent.folder}; calibrate this one.")


def _check_sizes(parent: Checkpoint, wishes: Wishes) -> None:
    """The numbers of experts and groups suit the parent, the placement and each other."""
    arch = parent.architecture
    if not arch.routed_as_usual:
        raise InputError(
            f"{parent.folder} routes with a selection bias, scoring_func or routed_scaling_factor of its own; only parents with "
            "plain softmax routing are expanded."
        )
    if wishes.num_experts < arch.num_experts:
        raise InputError(f"num_experts={wishes.num_experts} is less than the parent's {arch.num_experts}; no expert may be lost.")
    grouped = arch.router_n_groups > 1
    if wishes.num_experts == arch.num_experts and not wishes.regroup:
        way = "to route the same experts in groups give regroup=true (block_spread is the placement for it)"
        if grouped:
            way = f"it routes in groups already, so give a multiple of it, such as {2 * arch.num_experts}"
        raise InputError(f"num_experts={wishes.num_experts} is what {parent.folder} has; {way}.")
    if wishes.num_experts != arch.num_experts and wishes.regroup:
        raise InputError(f"regroup=true keeps the {arch.num_experts} experts of {parent.folder}; leave it out to expand them.")
    if wishes.placement not in ("map", "usage") and wishes.num_experts % arch.num_experts:
        copies = wishes.num_experts // arch.num_experts
        near = " or ".join(str(r * arch.num_experts) for r in (copies, copies + 1) if r > 1)
        unequal = "placement=map" if grouped else "placement=usage or placement=map"
        raise InputError(
            f"num_experts={wishes.num_experts} is not a multiple of the parent's {arch.num_experts}, so parents would get "
            f"unequal numbers of copies; give {near}, or choose the copies by {unequal}."
        )
    check_number_of_groups(parent, wishes.num_groups)
    _check_groups(wishes, arch.num_experts, arch.num_experts_per_tok)


def _check_groups(wishes: Wishes, parents: int, top_k: int) -> None:
    """The number of groups divides what it must, and suits the placement."""
    groups, slots = wishes.num_groups, wishes.num_experts
    if wishes.placement == "map":
        fitting = [count for count in range(1, top_k + 1) if gcd(top_k, slots) % count == 0]
    else:
        fitting = placements.fitting_groups(wishes.placement, parents, slots, top_k)
    if groups < 1 or top_k % groups or slots % groups:
        what = f"num_experts={slots}" if groups > 0 and top_k % groups == 0 else f"top-{top_k}"
        raise InputError(
            f"num_groups={groups} does not divide {what}, and every group needs as many choices and as many experts; for "
            f"placement={wishes.placement} {placements.suggestion(fitting, groups)}."
        )
    if wishes.placement != "map":
        placements.check_fit(wishes.placement, parents, slots, groups, top_k)


def _check_files(wishes: Wishes) -> None:
    """Files that a placement needs are given, and none that it would ignore."""
    for key in ("map", "usage"):
        given, wanted = getattr(wishes, key) is not None, wishes.placement == key
        if given and not wanted:
            raise InputError(
                f"{key}={getattr(wishes, key)} is for placement={key}; placement={wishes.placement} would ignore it."
            )
        if wanted and not given and (key == "map" or wishes.calibration is None):
            more = " or calibration=FOLDER" if key == "usage" else ""
            raise InputError(f"placement={key} needs {key}=FILE{more}.")
    if wishes.placement == "ranked" and wishes.calibration is None:
        raise InputError("placement=ranked sorts experts by how often they are the first choice; give calibration=FOLDER.")


def _maps(parent: Checkpoint, wishes: Wishes) -> tuple[tuple[int, ...], ...]:
    """Parent of every slot of every layer; nothing for layers without experts."""
    arch = parent.architecture
    layers = arch.moe_layers
    if wishes.map is not None:
        rows = placements.read_map(wishes.map, layers, arch.num_experts, wishes.num_experts)
    else:
        usage = None if wishes.usage is None else placements.read_usage(wishes.usage, layers, arch.num_experts)
        rows = {
            layer: placements.slot_map(
                wishes.placement,
                arch.num_experts,
                wishes.num_experts,
                wishes.num_groups,
                layer=layer,
                seed=wishes.init.seed,
                affinity=_affinity(parent, wishes, layer),
                popularity=_popularity(wishes, layer) if usage is None else usage[layer],
            )
            for layer in layers
        }
    return tuple(tuple(rows[layer].tolist()) if layer in rows else () for layer in range(arch.num_hidden_layers))


def _affinity(parent: Checkpoint, wishes: Wishes, layer: int) -> np.ndarray | None:
    """How often experts fire together: counted, or estimated from the angles between their router rows."""
    if wishes.placement not in placements.NEEDS_AFFINITY | {"usage"}:
        return None
    if wishes.calibration is not None:
        return wishes.calibration.layers[layer].coactivation
    return router_affinity(parent.read_numpy(parent.family.router_name(layer)).astype(np.float32))


def _popularity(wishes: Wishes, layer: int) -> np.ndarray | None:
    if wishes.calibration is None:
        return None
    counts = wishes.calibration.layers[layer]
    return counts.rank[0] if wishes.placement == "ranked" else counts.usage


def _usage_digest(file: Path) -> str:
    """SHA-256 of what a usage file says, however it is laid out."""
    return f"sha256:{hashlib.sha256(json.dumps(read_json(file), sort_keys=True).encode()).hexdigest()}"


def check_counts(plan: Plan, where: str, calibration: Calibration | None = None, usage: Path | None = None) -> None:
    """Refuse a calibration or a usage file that the plan was not made from; `where` holds the plan."""
    given: dict[str, tuple[Path, str]] = {}
    if calibration is not None:
        given["calibration"] = calibration.folder, calibration.digest
    if usage is not None:
        given["usage"] = usage, _usage_digest(usage)
    for key, (source, digest) in given.items():
        planned = getattr(plan, key)
        if digest != planned:
            made = "without one" if planned is None else f"from {planned}"
            raise InputError(f"{key}={source} is {digest}, but the map of {where} was made {made}.")


def check_map(
    parent: Checkpoint, plan: Plan, where: str, calibration: Calibration | None = None, usage: Path | None = None
) -> bool:
    """Refuse a map that the plan's placement does not give: a map of a user's own is placement "map".

    Args:
        where: what holds the plan, for messages.
        calibration, usage: used when they are those that the plan was made from.

    Returns:
        Whether the map was computed again, slot by slot. One that follows from a calibration or a usage file that is not at hand
        is checked for its form alone: the right number of copies in the right groups.

    Raises:
        InputError: the map is not the placement's; the message names the layer and the slot or group.
    """
    if plan.placement == "map":
        return False
    try:
        placements.check_fit(plan.placement, parent.architecture.num_experts, plan.num_experts, plan.num_groups)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    calibration = calibration if calibration is not None and calibration.digest == plan.calibration else None
    usage = usage if usage is not None and _usage_digest(usage) == plan.usage else None
    counted = calibration is not None or usage is not None
    lacking = (plan.calibration is not None and calibration is None) or (plan.usage is not None and usage is None)
    if lacking or (plan.placement in placements.NEEDS_POPULARITY and not counted):
        for layer in parent.architecture.moe_layers:
            _check_form(plan, layer, parent.architecture.num_experts, where)
        return False
    wishes = Wishes(
        num_experts=plan.num_experts,
        num_groups=plan.num_groups,
        placement=plan.placement,
        calibration=calibration,
        usage=usage,
        init=Init(seed=plan.seed),
    )
    for layer, (row, due_row) in enumerate(zip(plan.slot_to_parent, _maps(parent, wishes), strict=True)):
        for slot, (expert, due) in enumerate(zip(row, due_row, strict=True)):
            if expert != due:
                raise InputError(
                    f"{where} maps slot {slot} of layer {layer} to expert {expert}, but placement {plan.placement} to {due}; "
                    f"{OWN_MAP}."
                )
    return True


def _check_form(plan: Plan, layer: int, experts: int, where: str) -> None:
    """Groups show as many copies of a parent as they do by the placement, and the groups of a cut show every parent."""
    shown_GE = np.stack([np.bincount(group, minlength=experts) for group in _groups(plan, layer)])
    parts = placements.PLACEMENTS[plan.placement].parts
    if parts is None:
        wrong = np.flatnonzero((shown_GE > 1).any(1))
    else:
        parts = parts or plan.num_groups
        copies = parts * plan.num_experts // experts // plan.num_groups
        cuts = shown_GE.reshape(-1, parts, experts).sum(1).repeat(parts, 0)
        wrong = np.flatnonzero((((shown_GE != 0) & (shown_GE != copies)) | (cuts != copies)).any(1))
    if len(wrong):
        raise InputError(
            f"{where} maps experts to group {wrong[0]} of layer {layer} in a way that placement {plan.placement} never does; "
            f"{OWN_MAP}."
        )


def _groups(plan: Plan, layer: int) -> np.ndarray:
    """Parents of the slots of every group, [G, M]."""
    return np.array(plan.slot_to_parent[layer]).reshape(plan.num_groups, -1)


def warnings(parent: Checkpoint, plan: Plan) -> list[str]:
    """What a user should know before the child is written, a sentence each."""
    arch, found = parent.architecture, []
    picks = arch.num_experts_per_tok // plan.num_groups
    shared = [_copies_in_a_group(_groups(plan, layer)) for layer in arch.moe_layers]
    if picks > 1 and max(shared) > 1:
        found.append(
            f"groups hold up to {max(shared)} equal copies of a parent and pick {picks} each, so a token gets copies of fewer "
            "parents; choose more groups, or a placement with one copy a group."
        )
    if max(shared) > 1 and not plan.router_noise and picks == 1:
        found.append(
            "equal copies share groups and their router rows are equal, so only the first of them is picked until training moves "
            "the rows apart; router_noise=0.05 splits the tokens among them at once."
        )
    if plan.placement == "usage":
        found.append(
            "usage gives popular experts a slot in most groups, where they win most picks, so a token gets few distinct experts; "
            "look at the prediction."
        )
    if plan.placement == "ranked":
        found.append("ranked is a negative control: it is known to lose more than other placements.")
    noisy = plan.router_noise or plan.expert_noise or plan.init == "drop"
    if not noisy and _same_groups(_groups(plan, arch.moe_layers[0])):
        found.append(
            "some groups are equal to each other in every weight, so they get equal gradients and stay equal for ever; give "
            "router_noise=0.05 or expert_noise=0.01, or another placement."
        )
    return found


def _copies_in_a_group(groups_GM: np.ndarray) -> int:
    return max(int(np.bincount(group).max()) for group in groups_GM)


def _same_groups(groups_GM: np.ndarray) -> bool:
    members = [tuple(sorted(group)) for group in groups_GM.tolist()]
    return len(set(members)) < len(members)


def predict_step_zero(parent: Checkpoint, plan: Plan, calibration: Calibration) -> Prediction:
    """How close the child's routing is to the parent's at step 0, from the calibration's sample of router logits."""
    layers = parent.architecture.moe_layers
    return predict(
        {layer: calibration.logits(layer) for layer in layers},
        {layer: np.array(plan.slot_to_parent[layer]) for layer in layers},
        plan.num_groups,
        parent.architecture.num_experts_per_tok,
        parent.architecture.router_n_groups,
    )
