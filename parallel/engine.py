"""The engine: a model on this rank's share of the layout, with forward, training step, evaluation and logits.

Everything that the trainer needs of Megatron-Core goes through this class.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from moexpand.parallel import cpu, optimizer, weights
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.cross_entropy import split_cross_entropy
from moexpand.parallel.model import build_stage
from moexpand.parallel.optimizer import AdamSettings
from moexpand.parallel.ranks import Ranks
from moexpand.parallel.router import GroupedRouter
from moexpand.parallel.shape import DTYPES, Layout, ModelShape, RouterRules


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did, the same on every rank.

    Attributes:
        loss: sum of the losses of the unmasked tokens of the global batch, divided by their number.
        tokens: that number.
        grad_norm: of all gradients before clipping.
        skipped: a gradient was not finite and the weights stayed.
        dispatched: float64 [layers, experts], token copies sent to each expert.
        balance, z_loss: float64 [layers], token-weighted means over the micro-batches, without their coefficients.
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: bool
    dispatched: torch.Tensor
    balance: torch.Tensor
    z_loss: torch.Tensor


class Engine:
    """One rank's part of a model."""

    def __init__(self, shape: ModelShape, layout: Layout, rules: RouterRules, precision: str, ranks: Ranks) -> None:
        self.shape, self.layout, self.ranks = shape, layout, ranks
        self.model = build_stage(shape, layout, rules, DTYPES[precision])
        self.wrapped: Any = None
        self.optimizer: Any = None

    def fill(self, read: weights.Reader, order: weights.Order = weights.as_they_lie) -> set[str]:
        """Load weights by Hugging Face name, in this order; returns the names that this rank read."""
        return weights.fill(self.model, self.shape, read, order)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by Hugging Face name (see `weights.collect`)."""
        return weights.collect(self.model, self.shape)

    def prepare_training(self, settings: AdamSettings) -> None:
        """Wrap the model for data parallelism and build the optimiser; call after `fill`."""
        self.settings = settings
        self.wrapped = optimizer.wrap(self.model)
        self.optimizer = optimizer.build(self.wrapped, settings)

    def step(self, batches: Sequence[PackedBatch], lr: float) -> StepReport:
        """One optimiser step on this rank's micro-batches of the global batch (equally many on every data rank)."""
        self.wrapped.train()
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self._routers():
            router.reset_statistics()
        loss_sum, tokens = self._run(self.wrapped, batches, forward_only=False)
        optimizer.set_learning_rate(self.optimizer, lr)
        grad_norm, updated = optimizer.update(self.optimizer)
        dispatched, balance, z_loss = self._statistics(tokens)
        return StepReport(loss_sum / max(tokens, 1), int(tokens), grad_norm, not updated, dispatched, balance, z_loss)

    def evaluate(self, batches: Sequence[PackedBatch]) -> tuple[float, int]:
        """Loss per token and number of tokens of this rank's batches and all other ranks', without gradients."""
        self.model.eval()
        with torch.no_grad():
            loss_sum, tokens = self._run(self.model, batches, forward_only=True)
        return loss_sum / max(tokens, 1), int(tokens)

    def logits(self, batches: Iterable[PackedBatch]) -> list[torch.Tensor]:
        """Logits [T, V] in the model's dtype of each batch, whole on every rank of the last pipeline stage, empty elsewhere.

        Every data-parallel rank computes the batches that it is given; the ranks of an expert-parallel group must be given
        equally many of equal length.
        """
        self.model.eval()
        outputs: list[torch.Tensor] = []

        def keep(logits: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
            return logits

        for batch in batches:
            with torch.no_grad():
                stored = get_forward_backward_func()(
                    forward_step_func=lambda iterator, model: (self._forward(iterator, model)[0], keep),
                    data_iterator=iter([batch]),
                    model=[self.model],
                    num_microbatches=1,
                    seq_length=batch.tokens.numel(),
                    micro_batch_size=1,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
            if self.ranks.last_stage:
                outputs.append(_gather_columns(stored[0].flatten(0, 1)))
        return outputs

    @property
    def routed_layers(self) -> list[int]:
        """Decoder layers of this rank's stage that have a router."""
        return [router.layer_number - 1 for router in self._routers()]

    def observe_routing(
        self, batches: Sequence[PackedBatch], tell: Callable[[int, int, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Forward passes without the head that tell how every router of this rank routes.

        Args:
            batches: of equal length, equally many on every data-parallel rank.
            tell: called with the batch's number in `batches`, the decoder layer, logits [T', E] in fp32 and chosen experts
                int64 [T', K]. Under tensor parallelism T' counts the tokens of this rank's part of the batch (one of TP equal
                parts in order of the tensor ranks); otherwise it is the whole batch.
        """
        self.model.eval()
        number = -1

        def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            nonlocal number
            number += 1
            return self._forward(iterator, model)[0], lambda output, non_loss_data: None

        # Megatron-Core leaves out the head of a stage that is not said to be the last.
        self.model.post_process = False
        for router in self._routers():
            router.observer = lambda layer, logits_TE, chosen_TK: tell(number, layer, logits_TE, chosen_TK)
        try:
            with torch.no_grad():
                get_forward_backward_func()(
                    forward_step_func=forward_step,
                    data_iterator=iter(batches),
                    model=[self.model],
                    num_microbatches=len(batches),
                    seq_length=batches[0].tokens.numel(),
                    micro_batch_size=1,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
        finally:
            self.model.post_process = self.ranks.last_stage
            for router in self._routers():
                router.observer = None

    def _routers(self) -> Iterator[GroupedRouter]:
        return (layer.mlp.router for layer in self.model.decoder.layers)

    def _forward(self, iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, PackedBatch]:
        batch = next(iterator)
        self.model.rotary_pos_emb.positions = batch.positions
        output = model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            packed_seq_params=batch.packed_seq_params(),
            padding_mask=self._padding_mask(batch),
        )
        return output, batch

    def _padding_mask(self, batch: PackedBatch) -> torch.Tensor:
        """Bool [1, T], True where the loss does not count.

        Megatron-Core splits it over the tensor-parallel ranks on the first stage alone; later ones get their part here.
        """
        mask = (batch.loss_mask == 0)[None]
        if self.layout.tensor > 1 and not self.ranks.first_stage:
            mask = mask.chunk(self.layout.tensor, dim=1)[self.ranks.tensor_rank]
        return mask

    def _run(self, model: torch.nn.Module, batches: Sequence[PackedBatch], forward_only: bool) -> tuple[float, int]:
        """Megatron-Core's schedule over the micro-batches; returns loss sum and token count of the global batch."""

        def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            output, batch = self._forward(iterator, model)
            return output, partial(self._loss, batch)

        stored = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, dtype=torch.float64, device=cpu.device())
        for loss_sum, tokens in stored:
            sums += torch.stack((loss_sum.double(), tokens.double()))
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        return float(sums[0]), int(sums[1])

    def _loss(
        self, batch: PackedBatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Sum over the unmasked tokens, their number, and both again to be reported."""
        group = parallel_state.get_tensor_model_parallel_group()
        losses_T = split_cross_entropy(logits.flatten(0, 1), batch.labels, group)
        loss_sum = (losses_T * batch.loss_mask).sum()
        tokens = batch.loss_mask.sum()
        return loss_sum, tokens.int(), (loss_sum.detach(), tokens)

    def _statistics(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        table = torch.zeros(self.shape.num_hidden_layers, self.shape.num_experts + 2, dtype=torch.float64, device=cpu.device())
        for router in self._routers():
            table[router.layer_number - 1] = torch.cat((router.dispatched, router.losses))
        dist.all_reduce(table)
        table = table.cpu()
        return table[:, :-2], table[:, -2] / max(tokens, 1), table[:, -1] / max(tokens, 1)


def _gather_columns(local_TV: torch.Tensor) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return local_TV
    pieces = [torch.empty_like(local_TV) for _ in range(group.size())]
    dist.all_gather(pieces, local_TV.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)
