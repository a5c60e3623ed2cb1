"""Builds a rank's pipeline stages of Megatron-Core's GPTModel from our layer spec; modules are chosen here and nowhere else."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from moexpand.base.errors import InputError
from moexpand.parallel import cpu
from moexpand.parallel.attention import PackedAttention
from moexpand.parallel.experts import GroupedExperts
from moexpand.parallel.fusion import FusedLayer
from moexpand.parallel.moe import GroupedMoELayer
from moexpand.parallel.norm import RMSNorm
from moexpand.parallel.router import GroupedRouter
from moexpand.parallel.shape import Layout, ModelShape, RouterRules
from moexpand.parallel.stage import Head, Stage

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""What each value of `parallel.recompute` means to Megatron-Core."""


def transformer_config(shape: ModelShape, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Our shape and layout in Megatron-Core's words."""
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.moe_intermediate_size,
        moe_ffn_hidden_size=shape.moe_intermediate_size,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.num_experts_per_tok,
        moe_token_dispatcher_type="alltoall" if layout.dispatcher == "alltoall" else "allgather",
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,  # their router, which is not used here, would refuse top-1
        moe_router_dtype="fp32",
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        num_layers_in_first_pipeline_stage=layout.first_layers or None,
        num_layers_in_last_pipeline_stage=layout.last_layers or None,
        virtual_pipeline_model_parallel_size=layout.interleave if layout.interleave > 1 else None,
        # Batched sends and receives mix up the two directions where a stage's neighbours are one and the same rank.
        overlap_p2p_comm=layout.interleave > 1,
        batch_p2p_comm=layout.interleave == 1,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        deterministic_mode=False,
        use_cpu_initialization=True,
        **RECOMPUTE[layout.recompute],
    )


def _layer_spec(shape: ModelShape, layout: Layout, rules: RouterRules, groups: ProcessGroupCollection) -> ModuleSpec:
    router = partial(GroupedRouter, shape=shape, rules=rules)
    return ModuleSpec(
        module=FusedLayer if shape.vision is not None and shape.vision.deepstack_visual_indexes else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=GroupedMoELayer,
                params={"shape": shape, "rules": rules, "dispatcher": layout.dispatcher, "pg_collection": groups},
                submodules=MoESubmodules(experts=GroupedExperts, router=router),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_stages(shape: ModelShape, layout: Layout, rules: RouterRules, dtype: torch.dtype) -> list[Stage]:
    """This rank's parts of the model, one unless the pipeline is interleaved; weights not yet filled (`weights.fill` does that).

    The process groups must exist (`ranks.start`). Embedding and head are split over vocabulary rows.
    """
    config = transformer_config(shape, layout, dtype)
    _check_deepstack(shape, config)
    numbers = range(layout.interleave) if layout.interleave > 1 else [None]
    return [_build_stage(shape, layout, rules, config, number) for number in numbers]


def _check_deepstack(shape: ModelShape, config: TransformerConfig) -> None:
    """DeepStack's features are where the tower is, so the layers that take them must be there as well."""
    deep = len(shape.vision.deepstack_visual_indexes) if shape.vision is not None else 0
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    layers = get_num_layers_to_build(config, vp_stage=0 if interleaved else None, pp_rank=0)
    if layers < deep:
        raise InputError(
            f"DeepStack adds features to the first {deep} layers and the first part of the pipeline has {layers}; lower "
            "parallel.pipeline or parallel.interleave, or raise parallel.first_layers."
        )


def _build_stage(shape: ModelShape, layout: Layout, rules: RouterRules, config: TransformerConfig, number: int | None) -> Stage:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers = get_num_layers_to_build(config, vp_stage=number, pp_rank=groups.pp.rank())
    stage = Stage(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[_layer_spec(shape, layout, rules, groups)] * layers, layer_norm=RMSNorm
        ),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="none",  # PackedAttention turns queries and keys
        pg_collection=groups,
        vp_stage=number,
        shape=shape,
        recompute=layout.recompute == "full",
    )
    _mark_split_parameters(stage)
    return stage if stage.rotary.frequencies.is_meta else stage.to(cpu.device())


def _mark_split_parameters(model: Stage) -> None:
    """Say which parameters differ between tensor-parallel ranks, so that all their shares count in the gradient norm.

    Megatron-Core says so only where it initialises the weights itself.
    """
    split_axis = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, Head: 0, RowParallelLinear: 1}
    for module in model.modules():
        if type(module) in split_axis and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, split_axis[type(module)], 1)
