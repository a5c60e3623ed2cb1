"""A training worker in which numbers go wrong on rank 1: `-m tests.train.poisoned_worker HOW STEPS key=value ...`.

HOW, in each of the STEPS (1-based, with commas): `gradient` makes one element of a gradient NaN, `loss` makes the loss infinite,
`leap` makes loss and gradients ten times as large, `weight` makes a weight NaN after the update.
"""

import os
import sys
from typing import Any

from moexpand.train.signals import StopRequest


def poison(how: str, steps: set[int]) -> None:
    import torch

    from moexpand.parallel import optimizer, stage

    step = 1
    update, head_loss = optimizer.update, stage.head_loss

    def poisoned_update(chained: Any, refused: Any) -> Any:
        nonlocal step
        part = chained.chained_optimizers[0]
        if how == "gradient" and step in steps:
            parameter = next(iter(part.model_param_group_index_map))
            own = part._get_model_param_range_map(parameter)["param"]  # the share of the sum that this rank works with
            parameter.main_grad.view(-1)[own.start] = torch.nan
        found = update(chained, refused)
        if how == "weight" and step in steps:
            with torch.no_grad():
                next(iter(part.model_param_gbuf_map)).view(-1)[0] = torch.nan
        step += 1
        return found

    def poisoned_loss(*arguments: Any) -> torch.Tensor:
        factor = {"loss": torch.inf, "leap": 10.0}.get(how, 1.0)
        return head_loss(*arguments) * (factor if step in steps else 1.0)

    optimizer.update, stage.head_loss = poisoned_update, poisoned_loss


if __name__ == "__main__":
    how, steps = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
    if os.environ["RANK"] == "1" or how == "leap":
        poison(how, steps)

    from moexpand.train.work import train_worker

    sys.exit(train_worker(sys.argv[3:], StopRequest()))
