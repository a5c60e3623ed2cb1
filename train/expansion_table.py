"""What an expansion made of each layer, as a table for a run's records."""

from collections import Counter

from moexpand.upcycle.plan import Plan

COLUMNS = (
    "layer",
    "experts",
    "groups",
    "parents copied",
    "copies of one, least",
    "copies of one, most",
    "groups that hold a parent's copies, mean",
)


def expansion_rows(plan: Plan) -> list[list[float]]:
    """A row of `COLUMNS` for each layer with experts."""
    rows: list[list[float]] = []
    for layer, parents in enumerate(plan.slot_to_parent):
        if not parents:
            continue
        copies, size = Counter(parents), len(parents) // plan.num_groups
        places = {(parent, slot // size) for slot, parent in enumerate(parents)}
        spread = round(len(places) / len(copies), 4)
        rows.append([layer, len(parents), plan.num_groups, len(copies), min(copies.values()), max(copies.values()), spread])
    return rows
