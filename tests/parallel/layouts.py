"""The layouts that are proven, by name: docs/training.md lists them, and the tests of curves and gradients run them all."""

from typing import Any

TWO: dict[str, dict[str, Any]] = {
    "EP2": {"expert": 2},
    "EP2 allgather": {"expert": 2, "dispatcher": "allgather"},
    "DP2": {},
    "DP2 overlap": {"overlap": True},
    "PP2": {"pipeline": 2},
    "PP2 of 1 and 3 layers": {"pipeline": 2, "first_layers": 1},
    "PP2 recomputed": {"pipeline": 2, "recompute": "full"},
    "PP2 experts recomputed": {"pipeline": 2, "recompute": "selective"},
    "PP2 interleaved": {"pipeline": 2, "interleave": 2},
    "PP2 interleaved overlap": {"pipeline": 2, "interleave": 2, "overlap": True},
    "TP2": {"tensor": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2},
    "ETP2": {"expert_tensor": 2},
    "ETP2 allgather": {"expert_tensor": 2, "dispatcher": "allgather"},
    "TP2 ETP2": {"tensor": 2, "expert_tensor": 2},
    "CP2": {"context": 2},
    "CP2 EP2": {"context": 2, "expert": 2},
    "CP2 recomputed": {"context": 2, "recompute": "full"},
}
FOUR: dict[str, dict[str, Any]] = {
    "EP4": {"expert": 4},
    "EP2 DP2": {"expert": 2},
    "EP2 DP2 overlap": {"expert": 2, "overlap": True},
    "PP2 EP2": {"pipeline": 2, "expert": 2},
    "PP2 EP2 interleaved": {"pipeline": 2, "expert": 2, "interleave": 2},
    "TP2 EP4": {"tensor": 2, "expert": 4},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 PP2 interleaved": {"tensor": 2, "pipeline": 2, "interleave": 2, "recompute": "selective"},
    "ETP2 EP2": {"expert_tensor": 2, "expert": 2},
    "TP2 ETP2 EP2": {"tensor": 2, "expert_tensor": 2, "expert": 2},
    "CP2 TP2": {"context": 2, "tensor": 2},
    "CP2 PP2": {"context": 2, "pipeline": 2},
    "CP2 EP4": {"context": 2, "expert": 4},
    "CP4": {"context": 4},
}
GROUPED_TWO: dict[str, dict[str, Any]] = {
    "EP2 grouped_allgather": {"expert": 2, "dispatcher": "grouped_allgather"},
    "ETP2 grouped_allgather": {"expert_tensor": 2, "dispatcher": "grouped_allgather"},
    "TP2 EP2 grouped_allgather": {"tensor": 2, "expert": 2, "dispatcher": "grouped_allgather"},
    "CP2 EP2 grouped_allgather recomputed": {
        "context": 2, "expert": 2, "dispatcher": "grouped_allgather", "recompute": "selective",
    },
    "EP2 alltoall": {"expert": 2},
    "EP2 allgather": {"expert": 2, "dispatcher": "allgather"},
}  # fmt: skip
GROUPED_FOUR: dict[str, dict[str, Any]] = {
    "EP4 grouped_allgather": {"expert": 4, "dispatcher": "grouped_allgather"},
    "ETP2 EP2 grouped_allgather": {"expert_tensor": 2, "expert": 2, "dispatcher": "grouped_allgather"},
    "PP2 EP2 grouped_allgather interleaved": {
        "pipeline": 2, "expert": 2, "interleave": 2, "dispatcher": "grouped_allgather",
    },
    "EP2 DP2 grouped_allgather overlap": {"expert": 2, "dispatcher": "grouped_allgather", "overlap": True},
}  # fmt: skip
