"""The engine: a model on this rank's share of the layout, with forward, training step, evaluation and logits.

Everything that the trainer needs of Megatron-Core goes through this class.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from moexpand.base.errors import InputError
from moexpand.base.routes import check_routes
from moexpand.parallel import context, cpu, optimizer, phases, weights
from moexpand.parallel.batch import PackedBatch
from moexpand.parallel.head import gather_vocabulary
from moexpand.parallel.model import build_stages
from moexpand.parallel.moe import GroupedMoELayer
from moexpand.parallel.optimizer import AdamSettings, Rates
from moexpand.parallel.ranks import Ranks, any_rank
from moexpand.parallel.replay import Routes
from moexpand.parallel.router import GroupedRouter
from moexpand.parallel.shape import DTYPES, Layout, ModelShape, RouterRules
from moexpand.parallel.stage import Stage
from moexpand.parallel.step_report import Refusal, StepReport, why_not
from moexpand.parallel.watch import RouterWatch


class Engine:
    """One rank's part of a model."""

    def __init__(self, shape: ModelShape, layout: Layout, rules: RouterRules, precision: str, ranks: Ranks) -> None:
        self.shape, self.layout, self.ranks = shape, layout, ranks
        self.stages: list[Stage] = build_stages(shape, layout, rules, DTYPES[precision])
        self.wrapped: list[Any] = []
        self.optimizer: Any = None
        self.before_update: Callable[[], None] = lambda: None
        """Called when a step's gradients are there and weights and states are about to change."""

    def fill(self, read: weights.Reader, order: weights.Order = weights.as_they_lie) -> set[str]:
        """Load weights by Hugging Face name, in this order; returns the names that this rank read."""
        return weights.fill(self.stages, self.shape, read, order)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by Hugging Face name (see `weights.collect`)."""
        with optimizer.weights_settled(self.wrapped):
            yield from weights.collect(self.stages, self.shape)

    def prepare_training(self, settings: AdamSettings) -> None:
        """Wrap the model for data parallelism and build the optimiser; call after `fill`."""
        self.settings = settings
        optimizer.freeze(self.stages, settings.frozen_parts)
        self.wrapped = optimizer.wrap(self.stages, self.layout.overlap)
        self.optimizer = optimizer.build(self.wrapped, settings)

    def step(
        self,
        batches: Sequence[PackedBatch],
        lr: float | Rates,
        routes: Sequence[np.ndarray] | None = None,
        record: bool = False,
        watch: RouterWatch | None = None,
        refused: Refusal | None = None,
    ) -> StepReport:
        """One optimiser step on this rank's micro-batches of the global batch (equally many on every data rank).

        Args:
            lr: one learning rate, or those of the parts.
            routes: experts to visit, [T, layers, K] for each micro-batch, instead of the routers' choice; given on all ranks or
                on none.
            record: give back the routes.
            watch: looks at the routers' work and measures the parts of the step.
            refused: why an update is not wanted, given loss and gradient norm, both finite (empty: it is); must say the same on
                all ranks.

        Raises:
            InputError: on all ranks, where the routes of one are not for this model and its micro-batches.
        """
        rates = lr if isinstance(lr, Rates) else Rates(lr)
        if watch is None:
            return self._step(batches, rates, self._routes(batches, routes, record), refused)
        with phases.measured() as seconds, watch.watching(self.routers):
            report = self._step(batches, rates, self._routes(batches, routes, record), refused)
        return replace(report, seconds=dict(seconds), watched=watch.take(self.shape.num_hidden_layers))

    def _step(self, batches: Sequence[PackedBatch], rates: Rates, routes: Routes | None, refused: Refusal | None) -> StepReport:
        for wrapped in self.wrapped:
            wrapped.train()
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        for layer in self.moe_layers:
            layer.router.reset_statistics()
            layer.experts.rows_computed = 0
        with phases.timed("forward_backward"):
            loss_sum, tokens, recorded = self._run(self.wrapped, batches, False, routes)
        self.before_update()
        for layer in self.moe_layers:
            layer.end_passes()
        with phases.timed("optimizer"):
            optimizer.set_learning_rates(self.optimizer, rates)
            loss = loss_sum / max(tokens, 1)
            grad_norm, skipped = optimizer.update(self.optimizer, partial(why_not, refused, loss))
        table, rank_rows = self._statistics()
        for layer in self.moe_layers:
            layer.end_step(table[layer.router.layer, :-3], not skipped)
        table = table.cpu()
        balance, group_balance, z_loss = (table[:, -3:] / max(tokens, 1)).unbind(1)
        return StepReport(
            loss=loss,
            tokens=int(tokens),
            grad_norm=grad_norm,
            skipped=skipped,
            dispatched=table[:, :-3],
            balance=balance,
            group_balance=group_balance,
            z_loss=z_loss,
            rank_rows=rank_rows,
            routes=recorded,
        )

    def is_finite(self) -> bool:
        """Whether every weight of every rank is a finite number."""
        with optimizer.weights_settled(self.wrapped), torch.no_grad():
            largest = [torch.linalg.vector_norm(each, torch.inf) for stage in self.stages for each in stage.parameters()]
            finite = bool(torch.stack(largest).double().isfinite().all())
        return not any_rank(not finite)[0]

    def evaluate(self, batches: Sequence[PackedBatch]) -> tuple[float, int]:
        """Loss per token and number of tokens of this rank's batches and all other ranks', without gradients."""
        with self._evaluating():
            loss_sum, tokens, _ = self._run(self.stages, batches, True, None)
        return loss_sum / max(tokens, 1), int(tokens)

    def logits(
        self, batches: Iterable[PackedBatch], routes: Sequence[np.ndarray] | None = None, record: bool = False
    ) -> tuple[list[torch.Tensor], list[np.ndarray] | None]:
        """Logits [T, V] in the model's dtype of each batch, whole on every rank of the last pipeline stage, empty elsewhere.

        Every data-parallel rank computes the batches that it is given; the ranks of an expert-parallel group must be given
        equally many of equal length. Routes are replayed, refused and recorded as in `step`, and are whole on every rank.
        """
        outputs: list[torch.Tensor] = []
        recorded: list[np.ndarray] = []

        def keep(logits: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
            return logits

        for number, batch in enumerate(batches):
            table = self._routes([batch], None if routes is None else [routes[number]], record)
            with self._evaluating():
                stored = self._schedule(
                    self.stages,
                    [batch],
                    lambda micro, model: (self._forward(micro, model), keep),
                    table,
                    collect_non_loss_data=True,
                )
            if self.ranks.last_stage:
                whole = gather_vocabulary(stored[0].flatten(0, 1), parallel_state.get_tensor_model_parallel_group())
                outputs.append(context.gather(whole))
            if table is not None and record:
                recorded += self._collect(table, [batch])
        return outputs, recorded if record else None

    @property
    def moe_layers(self) -> list[GroupedMoELayer]:
        """The Mixture-of-Experts layers of this rank's stages."""
        return [layer.mlp for stage in self.stages for layer in stage.decoder.layers]

    @property
    def routers(self) -> list[GroupedRouter]:
        """Their routers."""
        return [layer.router for layer in self.moe_layers]

    @property
    def routed_layers(self) -> list[int]:
        """Decoder layers of this rank's stages that have a router."""
        return [router.layer for router in self.routers]

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
        assert self.layout.context == 1
        number = -1

        def forward_step(micro: _Micro, model: Any) -> tuple[torch.Tensor, Any]:
            nonlocal number
            number = micro.number
            return self._forward(micro, model), lambda output, non_loss_data: None

        def observe(layer: int, logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> None:
            if number < len(batches):  # more are only run to fill an interleaved pipeline
                tell(number, layer, logits_TE, chosen_TK)

        # Megatron-Core leaves out the head of a stage that is not said to be the last.
        last = self.stages[-1].post_process
        self.stages[-1].post_process = False
        for router in self.routers:
            router.observer = observe
        try:
            with self._evaluating():
                self._schedule(self.stages, batches, forward_step, None, collect_non_loss_data=True)
        finally:
            self.stages[-1].post_process = last
            for router in self.routers:
                router.observer = None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for stage in self.stages:
            stage.eval()
        with optimizer.weights_settled(self.wrapped):
            yield

    def _run(
        self, models: Sequence[Any], batches: Sequence[PackedBatch], forward_only: bool, routes: Routes | None
    ) -> tuple[float, int, list[np.ndarray] | None]:
        """Loss sum and token count of the global batch, and recorded routes."""

        def forward_step(micro: "_Micro", model: Any) -> tuple[torch.Tensor, Any]:
            tokens = micro.batch.loss_mask.sum()
            return self._forward(micro, model, with_loss=True), partial(_report, tokens)

        stored = self._schedule(models, batches, forward_step, routes, forward_only=forward_only)
        sums = torch.zeros(2, dtype=torch.float64, device=cpu.device())
        for loss_sum, tokens in stored:
            sums += torch.stack((loss_sum.double(), tokens.double()))
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        recorded = self._collect(routes, batches) if routes is not None and routes.recorded is not None else None
        return float(sums[0]), int(sums[1]), recorded

    def _schedule(
        self,
        models: Sequence[Any],
        batches: Sequence[PackedBatch],
        forward_step: Callable[["_Micro", Any], tuple[torch.Tensor, Any]],
        routes: Routes | None,
        forward_only: bool = True,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """Megatron-Core's pipeline schedule over the micro-batches; returns what the last stage stored for each."""
        batches = self._filled_up(batches) if forward_only else batches
        micros, first = [], 0
        for number, batch in enumerate(batches):
            micros.append(_Micro(number, *batch.split(first)))
            first += batch.tokens.numel()
        for router in self.routers:
            router.routes = routes
        try:
            with torch.set_grad_enabled(not forward_only):
                stored: list[Any] = get_forward_backward_func()(
                    forward_step_func=lambda iterator, model: forward_step(next(iterator), model),
                    data_iterator=[iter(micros) for _ in models],
                    model=list(models),
                    num_microbatches=len(micros),
                    seq_length=batches[0].tokens.numel(),
                    micro_batch_size=1,
                    forward_only=forward_only,
                    collect_non_loss_data=collect_non_loss_data,
                )
        finally:
            for router in self.routers:
                router.routes = None
        return stored

    def _filled_up(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """An interleaved schedule takes multiples of the stages; the last batch comes again, masked."""
        lacking = -len(batches) % self.layout.pipeline if self.layout.interleave > 1 else 0
        blank = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
        return [*batches, *[blank] * lacking]

    def _forward(self, micro: "_Micro", model: Any, with_loss: bool = False) -> torch.Tensor:
        batch, stage = micro.batch, getattr(model, "module", model)
        tags = micro.tags[None]
        if self.layout.tensor > 1 and not stage.pre_process:
            # Megatron-Core splits them over the tensor-parallel ranks on the first stage alone.
            tags = tags.chunk(self.layout.tensor, dim=1)[self.ranks.tensor_rank]
        output: torch.Tensor = model(
            input_ids=batch.tokens[None],
            position_ids=None,
            attention_mask=None,
            labels=batch.labels[None] if with_loss else None,
            loss_mask=batch.loss_mask[None] if with_loss else None,
            packed_seq_params=batch.stream(),
            padding_mask=tags,
        )
        return output

    def _routes(self, batches: Sequence[PackedBatch], routes: Sequence[np.ndarray] | None, record: bool) -> Routes | None:
        if routes is not None:
            self._check_routes(batches, routes)
            return Routes.replaying(self._filled_routes(routes))
        if not record:
            return None
        tokens = sum(batch.tokens.numel() for batch in self._filled_up(batches))
        return Routes(self.shape.num_hidden_layers, tokens, self.shape.num_experts_per_tok)

    def _check_routes(self, batches: Sequence[PackedBatch], routes: Sequence[np.ndarray]) -> None:
        """Refuse routes on all ranks alike: one that went on alone would wait for the others for ever."""
        shape, wrong = self.shape, ""
        try:
            if len(routes) != len(batches):
                raise InputError(f"The routes of {len(routes)} micro-batches were given for {len(batches)}.")
            for number, (batch, each) in enumerate(zip(batches, routes, strict=True)):
                due = (batch.tokens.numel(), shape.num_hidden_layers, shape.num_experts_per_tok)
                check_routes(each, due, shape.num_experts, shape.router_n_groups, f"The routes of micro-batch {number}")
        except InputError as error:
            wrong = str(error)
        others = torch.tensor(float(bool(wrong)), device=cpu.device())
        dist.all_reduce(others)
        if wrong or others:
            raise InputError(wrong or "The routes that another rank was given are refused there.")

    def _filled_routes(self, routes: Sequence[np.ndarray]) -> list[np.ndarray]:
        lacking = -len(routes) % self.layout.pipeline if self.layout.interleave > 1 else 0
        return [*routes, *[routes[-1]] * lacking]

    def _collect(self, routes: Routes, batches: Sequence[PackedBatch]) -> list[np.ndarray]:
        """Recorded routes of each micro-batch, whole on every rank that shares it."""
        groups = [
            parallel_state.get_tensor_and_context_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ]
        whole = routes.collect(groups, self.shape.num_experts)
        bounds = np.cumsum([batch.tokens.numel() for batch in batches])
        return np.split(whole[: bounds[-1]], bounds[:-1])

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts and losses of every layer, float64 [layers, experts + 3], and rows of every rank, float64 [ranks] on the CPU."""
        layers, experts = self.shape.num_hidden_layers, self.shape.num_experts
        whole = torch.zeros(layers * (experts + 3) + self.ranks.world_size, dtype=torch.float64, device=cpu.device())
        table, rank_rows = whole[: layers * (experts + 3)].view(layers, -1), whole[layers * (experts + 3) :]
        for layer in self.moe_layers:
            table[layer.router.layer] = torch.cat((layer.router.dispatched, layer.router.losses))
            rank_rows[self.ranks.world_rank] += layer.experts.rows_computed
        dist.all_reduce(whole)
        return table, rank_rows.cpu()


@dataclass(frozen=True)
class _Micro:
    """This rank's part of a micro-batch: its number in the step, tokens, and a tag for each (see `GroupedRouter`)."""

    number: int
    batch: PackedBatch
    tags: torch.Tensor


def _report(tokens: torch.Tensor, loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Loss sum, number of tokens, and both again to be reported."""
    return loss_sum, tokens.int(), (loss_sum.detach(), tokens)
