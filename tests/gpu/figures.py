"""Loss, logits and gradients of a step on the device that this process sees.

`python -m tests.gpu.figures FOLDER OUT PRECISION [ROUTES]`: a process of its own, so that a CPU's figures can be had on a machine
with a GPU, by an empty CUDA_VISIBLE_DEVICES.
"""

import sys
from pathlib import Path

import numpy as np

from tests.parallel import runs

RULES = {"gradient": "ste", "balance_coefficient": 1e-2, "group_coefficient": 1e-2, "z_loss_coefficient": 1e-3}


def main(folder: Path, out: Path, precision: str, routes_file: Path | None = None) -> None:
    """Write an .npz of `loss`, `logits` [T, V], `routes` [T, layers, K] and every gradient by its Hugging Face name."""
    from moexpand.parallel import cpu, weights
    from moexpand.parallel.batch import PackedBatch

    routes = None if routes_file is None else [np.load(routes_file)["routes"]]
    with runs.engine(folder, {}, RULES, precision) as built:
        runs.prepare(built, clip_grad=0.0, weight_decay=0.0)
        batches = [PackedBatch.from_arrays(runs.micro_batch(0), cpu.device())]
        (logits,), recorded = built.logits(batches, routes, record=routes is None)
        report = built.step(batches, 0.0, routes=recorded or routes)
        gradients = weights.collect(built.stages, built.shape, lambda parameter: parameter.main_grad)
        found = {name: value.cpu().double().numpy() for name, value in gradients}
    arrays = {"loss": np.array(report.loss), "logits": logits.cpu().double().numpy(), "routes": (recorded or routes)[0]}
    np.savez(out, **arrays, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(Path, sys.argv[4:]))
