"""How alike the experts still are that were copied from the same parent.

Cosines of a family of n vectors come from one sum: with unit vectors u_i, the mean over pairs is (|sum u_i|^2 - n) / (n (n - 1)).

* Weights: an expert's matrices are far too large to bring together, so each is projected on random signs (a Johnson-Lindenstrauss
  sketch, the same for all experts of a layer and on every rank); cosines of sketches of width d are off by about
  (1 - cosine) * sqrt(2 / d), so that equal experts have cosine 1 exactly.
* Router rows: exact.
* Outputs, on request: every expert of the layer runs on the same few hidden states.

Legend: E experts, e of them on this rank, P parents, H hidden, I intermediate of this rank, N probed tokens, D width of a sketch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from moexpand.parallel import cpu
from moexpand.parallel.engine import Engine
from moexpand.parallel.experts import GroupedExperts
from moexpand.parallel.moe import GroupedMoELayer
from moexpand.parallel.optimizer import weights_settled

SKETCH = 1024
"""Least width of a sketch of each matrix; a multiple of the hidden size."""


def family_cosine(vectors_EX: torch.Tensor, parent_of_E: torch.Tensor) -> torch.Tensor:
    """Mean cosine over the pairs of experts with the same parent, mean over the parents with several; NaN when there is none.

    Args:
        vectors_EX: [E, ..., X]; axes between are averaged over.
        parent_of_E: int64 [E].
    """
    units = torch.nn.functional.normalize(vectors_EX.double(), dim=-1)
    sums = torch.zeros(int(parent_of_E.max()) + 1, *units.shape[1:], dtype=units.dtype, device=units.device)
    sums.index_add_(0, parent_of_E, units)
    return _from_sums(sums, torch.bincount(parent_of_E, minlength=len(sums)))


def _from_sums(sums_PX: torch.Tensor, sizes_P: torch.Tensor) -> torch.Tensor:
    several = sizes_P > 1
    if not several.any():
        return sums_PX.new_tensor(torch.nan)
    squares = sums_PX[several].square().sum(-1)
    sizes = sizes_P[several].to(squares.dtype).view(-1, *[1] * (squares.dim() - 1))
    return ((squares - sizes) / (sizes * (sizes - 1))).mean()


def similarities(
    engine: Engine, parent_of: Mapping[int, torch.Tensor], probes: Mapping[int, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Cosines of siblings in every layer, float64 [layers] on the CPU, NaN for layers without a map. All ranks call it.

    The weights are those that the last step left, also where ranks exchange them late.

    Args:
        parent_of: by decoder layer, int64 [E] on the device, the parent of every expert.
        probes: hidden states [N, H] by decoder layer on which to compare outputs; those of one rank are taken.

    Returns:
        `weights`, `router` and, with probes, `outputs`.
    """
    with torch.no_grad(), weights_settled(engine.wrapped):
        return _similarities(engine, parent_of, probes)


def _similarities(
    engine: Engine, parent_of: Mapping[int, torch.Tensor], probes: Mapping[int, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    names = ["weights", "router", *(["outputs"] if probes else [])]
    table = torch.full((engine.shape.num_hidden_layers, len(names)), torch.nan, dtype=torch.float64, device=cpu.device())
    for layer in engine.moe_layers:
        number = layer.router.layer
        if number not in parent_of:
            continue
        parents = parent_of[number]
        table[number, 0] = family_cosine(_sketches(layer, engine.shape.moe_intermediate_size), parents)
        table[number, 1] = family_cosine(layer.router.weight, parents)
        if probes:
            table[number, 2] = _output_cosine(layer, parents, probes[number])
    # Every rank of a stage has the same numbers; other stages have others.
    whole = torch.nan_to_num(table, nan=-9.0)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    whole = torch.where(whole < -1.5, torch.nan, whole).cpu()
    return dict(zip(names, whole.unbind(1), strict=True))


def _sketches(layer: GroupedMoELayer, intermediate: int) -> torch.Tensor:
    """Sketches of all experts of a layer, fp32 [E, D], the same on every rank of the stage."""
    experts: GroupedExperts = layer.experts
    own, rank = experts.down.shape[2], experts.tensor_group.rank()
    copies = -(-SKETCH // experts.down.shape[1])
    generator = torch.Generator().manual_seed(layer.router.layer)
    # Signs [copies, 3, I] of gate, up and down along the intermediate axis, from which every rank takes its part.
    signs = torch.randint(0, 2, (copies, 3, intermediate), generator=generator).float() * 2 - 1
    signs = signs[..., rank * own : (rank + 1) * own].to(experts.down.device)
    found = torch.cat(
        [
            torch.einsum("eih,si->esh", experts.gate_up[:, 0].float(), signs[:, 0]).flatten(1),
            torch.einsum("eih,si->esh", experts.gate_up[:, 1].float(), signs[:, 1]).flatten(1),
            torch.einsum("ehi,si->esh", experts.down.float(), signs[:, 2]).flatten(1),
        ],
        dim=1,
    )
    if experts.tensor_group.size() > 1:
        dist.all_reduce(found, group=experts.tensor_group)
    return _gather(found, experts.ep_group)


def _output_cosine(layer: GroupedMoELayer, parents: torch.Tensor, probe_NH: torch.Tensor) -> torch.Tensor:
    experts: GroupedExperts = layer.experts
    probe = probe_NH.clone()
    dist.broadcast(probe, dist.get_global_rank(layer.stage_group, 0), group=layer.stage_group)
    local, tokens = experts.num_local_experts, len(probe)
    rows = experts.rows_given(torch.full((local,), tokens))
    outputs = experts(probe.repeat(local, 1), probe.new_ones(local * tokens, dtype=torch.float32), rows)
    outputs = outputs.view(local, tokens, -1).float()
    if experts.tensor_group.size() > 1:
        dist.all_reduce(outputs, group=experts.tensor_group)
    units = torch.nn.functional.normalize(outputs.double(), dim=-1)
    first = experts.ep_group.rank() * local
    sums = torch.zeros(int(parents.max()) + 1, tokens, units.shape[-1], dtype=units.dtype, device=units.device)
    sums.index_add_(0, parents[first : first + local], units)
    dist.all_reduce(sums, group=experts.ep_group)
    return _from_sums(sums, torch.bincount(parents, minlength=len(sums)))


def _gather(per_expert: torch.Tensor, group: Any) -> torch.Tensor:
    """All experts' rows from the ranks' shares."""
    return gather_from_sequence_parallel_region(per_expert, group=group) if group.size() > 1 else per_expert
