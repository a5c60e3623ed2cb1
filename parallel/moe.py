"""The Mixture-of-Experts layer of a decoder: route, dispatch, compute, combine.

Legend: T tokens of this rank, E experts, K chosen, H hidden.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moexpand.parallel import phases
from moexpand.parallel.default_vectors import DefaultVectors
from moexpand.parallel.dispatcher import GroupedAllGather
from moexpand.parallel.router import Choice, GroupedRouter
from moexpand.parallel.shape import ModelShape, RouterRules


class GroupedMoELayer(MoELayer):
    """Megatron-Core's layer with our router, and our own path where a rank holds whole groups.

    Attributes:
        own: the dispatcher of that path, also where no tokens travel; None where one of Megatron-Core's dispatches.
    """

    router: GroupedRouter

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        shape: ModelShape,
        rules: RouterRules,
        dispatcher: str,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        self.token_dispatcher: Any
        self.own: GroupedAllGather | None = None
        if dispatcher == "grouped_allgather" or pg_collection.tp_ep.size() == 1:
            self.own = GroupedAllGather(shape.num_experts, shape.num_experts_per_tok, pg_collection)
            self.token_dispatcher = None
        self.default_vectors: DefaultVectors | None = None
        self._outputs: tuple[torch.Tensor, torch.Tensor] | None = None
        if rules.gradient == "default_vector":
            wide = torch.promote_types(config.params_dtype, torch.float32)
            self.default_vectors = DefaultVectors(shape.num_experts, shape.hidden_size, rules.default_decay, wide)
            self.experts.average_outputs = True
        self.stage_group = pg_collection.tp_dp_cp

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: None = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [T, 1, H] with their tags, int64 [1, T], where Megatron-Core has a padding mask; [T, 1, H], no bias."""
        assert padding_mask is not None
        tags_T = padding_mask.flatten()
        if self.moe_layer_recompute and self.training:
            output = checkpoint(self._compute, False, hidden_states, tags_T)
        else:
            output = self._compute(hidden_states, tags_T)
        return output, None

    def _compute(self, hidden_states: torch.Tensor, tags_T: torch.Tensor) -> torch.Tensor:
        tokens_TH = hidden_states.flatten(0, 1)
        with phases.timed("router"):
            choice = self.router(tokens_TH, tags_T)
        output_TH = self._visit(tokens_TH, choice) if self.own is not None else self._dispatch(tokens_TH, choice)
        if self.default_vectors is not None and choice.shares is not None:
            output_TH = self.default_vectors.represent(output_TH, choice.shares)
        return output_TH.view(hidden_states.shape)

    def _visit(self, tokens_TH: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Our path: the rows of this rank are known beforehand."""
        assert self.own is not None
        with phases.timed("dispatch"):
            tokens_UH, local_UC, weights_UC = self.own.gather(tokens_TH, choice.chosen, choice.weights)
        with phases.timed("experts"):
            outputs_UH = self.experts(tokens_UH, weights_UC, self.experts.rows_of(local_UC))
        with phases.timed("combine"):
            return self.own.scatter(outputs_UH)

    def _dispatch(self, tokens_TH: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Megatron-Core's dispatchers, which take a dense table of weights and a map, both [T, E]."""
        dispatcher, experts = self.token_dispatcher, self.router.num_experts
        with phases.timed("dispatch"):
            dense_TE = choice.weights.new_zeros(len(tokens_TH), experts).scatter(1, choice.chosen, choice.weights)
            map_TE = torch.zeros_like(dense_TE, dtype=torch.bool).scatter(1, choice.chosen, True)
            tokens, weights = dispatcher.dispatch_preprocess(tokens_TH[:, None], map_TE, dense_TE)
            tokens, weights = dispatcher.token_dispatch(tokens, weights)
            rows, rows_per_expert, weights = dispatcher.dispatch_postprocess(tokens, weights)
        with phases.timed("experts"):
            outputs = self.experts(rows, weights, self.experts.rows_given(rows_per_expert))
        with phases.timed("combine"):
            outputs = dispatcher.token_combine(dispatcher.combine_preprocess(outputs))
            return dispatcher.combine_postprocess(outputs).flatten(0, 1)

    def end_passes(self) -> None:
        """Take what the experts put out in the step's passes; called before the optimiser, while the weights are still theirs."""
        if self.default_vectors is not None:
            self._outputs = self.experts.take_output_sums()

    def end_step(self, dispatched_E: torch.Tensor, updated: bool) -> None:
        """What a layer carries from a step to the next: its load, float64 [E] over all ranks, and the default vectors.

        A step that did not update the weights leaves these as they are too.
        """
        if updated:
            self.router.end_step(dispatched_E)
            if self.default_vectors is not None and self._outputs is not None:
                self.default_vectors.update(*self._outputs, self.experts, (self.stage_group,))
        self._outputs = None
