"""Weights and moments as an engine's optimiser holds them, by Hugging Face name, without what checkpoints are made with."""

from typing import Any

import numpy as np

from tests.parallel.runs import Block, merged

STATES = ("param", "exp_avg", "exp_avg_sq")

Held = dict[str, list[Block]]
"""This rank's parts of each state, NaN where another rank holds them."""


def held(built: Any) -> Held:
    """Read off Megatron-Core's own tables, by Hugging Face name, without what checkpoints are made with."""
    from moexpand.parallel import weights

    def read(state: str) -> list[Block]:
        import torch

        def values(parameter: torch.Tensor) -> torch.Tensor:
            found = torch.full(parameter.shape, torch.nan)
            for part in built.optimizer.chained_optimizers:
                if parameter in part.model_param_gbuf_map:
                    span = part._get_model_param_range_map(parameter)["param"]
                    group, position = part.model_param_group_index_map[parameter]
                    shard = part.optimizer.param_groups[group]["params"][position]
                    flat = shard if state == "param" else part.optimizer.state[shard][state]
                    found.view(-1)[span.start : span.end] = flat.detach()
            return found

        return [
            (part.name, part.shape, part.rows, part.columns, part.local.clone().numpy())
            for part in weights.parts(built.stages, built.shape, values)
        ]

    return {state: read(state) for state in STATES}


def whole_of(answers: list[tuple[Held, list[float]]], steps: float = 3.0) -> dict[str, dict[str, np.ndarray]]:
    assert {step for _, each in answers for step in each} == {steps}
    whole = {state: merged([found[state] for found, _ in answers]) for state in STATES}
    assert not any(np.isnan(value).any() for tensors in whole.values() for value in tensors.values()), (
        "some part is held by nobody"
    )
    return whole
