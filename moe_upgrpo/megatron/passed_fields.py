# SPDX-License-Identifier: Apache-2.0
"""Treatment of each of Megatron-Core's own options, `--megatron.NAME VALUE`.

Every field of TransformerConfig, MLATransformerConfig, OptimizerConfig and
DistributedDataParallelConfig of 0.16.1 and of 0.19.2 is in one of these tables, some by a pattern
of names. Imports no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase


def _names(text: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), reason)


# Name, or pattern of names -> the option of ours that sets it.
OURS: dict[str, str] = {
    "tensor_model_parallel_size": "--tp",
    "sequence_parallel": "--tp",
    "context_parallel_size": "--cp",
    "pipeline_model_parallel_size": "--pp",
    "virtual_pipeline_model_parallel_size": "--vpp",
    "expert_model_parallel_size": "--ep",
    "expert_tensor_parallel_size": "--etp",
    **_names("params_dtype pipeline_dtype bf16", "--dtype"),
    **_names(
        "recompute_* distribute_saved_activations moe_layer_recompute "
        "num_microbatches_with_partial_activation_checkpoints",
        "--recompute",
    ),
    "moe_enable_routing_replay": "--replay",
    "deterministic_mode": "--deterministic",
    **_names("lr min_lr decoupled_lr decoupled_min_lr", "--optimizer.lr"),
    "weight_decay": "--optimizer.weight-decay",
    "adam_beta1": "--optimizer.beta1",
    "adam_beta2": "--optimizer.beta2",
    "adam_eps": "--optimizer.eps",
    "clip_grad": "--optimizer.clip-grad",
    **_names(
        "optimizer use_distributed_optimizer use_layer_wise_distributed_optimizer sgd_momentum "
        "muon_* lion_* soap_* adaptive_muon_*",
        "--optimizer.algorithm, which is adam or sgd without momentum",
    ),
}

# Name, or pattern of names -> why it is refused.
REFUSED: dict[str, str] = {
    # First, because the other reasons are about options that one might want.
    **_names(
        "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels "
        "softmax_scale softmax_type apply_residual_connection_post_layernorm layernorm_epsilon "
        "layernorm_zero_centered_gamma add_bias_linear add_qkv_bias gated_linear_unit "
        "glu_linear_offset activation_func_clamp_value num_moe_experts rotary_* window_size "
        "window_attn_skip_freq normalization qk_layernorm qk_l2_norm attention_output_gate "
        "multi_latent_attention no_rope_freq experimental_attention_variant dsa_* linear_* "
        "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_layer_freq "
        "moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk "
        "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function "
        "moe_router_enable_expert_bias moe_router_topk_limited_devices moe_latent_size "
        "moe_apply_probs_on_input mrope_section is_hybrid_model mamba_* use_mamba_mem_eff_path "
        "heterogeneous_block_specs hetereogenous_dist_checkpoint q_lora_rank kv_lora_rank "
        "qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type original_max_position_embeddings "
        "beta_fast beta_slow mscale mscale_all_dim use_mup mup_*",
        "the checkpoint's config.json says what the model is",
    ),
    **_names(
        "moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_token_dropping "
        "moe_token_drop_policy moe_pad_expert_input_to_capacity",
        "dropped tokens miss experts that the log says they used; training is dropless",
    ),
    **_names(
        "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_per_layer_logging "
        "moe_grad_scale_func",
        "an auxiliary loss would add a gradient that is in no loss of this package",
    ),
    "moe_input_jitter_eps": "noise on the router's input makes routes that no replay repeats",
    **_names(
        "moe_router_force_load_balancing moe_router_force_biased moe_router_quantile_balancing_ema",
        "experts would be chosen by something else than the router that is recorded",
    ),
    "moe_router_bias_update_rate": (
        "the selection bias stays that of the checkpoint: engine and trainer share it"
    ),
    "moe_router_fusion": (
        "the fused router returns before anything is recorded or replayed (moe_utils.py:652)"
    ),
    "fp32_residual_connection": (
        "norms and layers without Transformer Engine take one precision, and engines have no such "
        "residual: it would be a mismatch of its own"
    ),
    "moe_router_dtype": "routers compute in fp32, in which margins and gates are recorded",
    **_names(
        "moe_router_padding_for_quantization moe_router_padding_for_fp8",
        "it gives experts tokens that the router did not choose; Transformer Engine's experts pad "
        "by themselves",
    ),
    **_names(
        "hidden_dropout attention_dropout",
        "with dropout the log-probs of the update are not those that are scored",
    ),
    **_names("mtp_*", "multi-token prediction adds a loss, and layers that no export holds"),
    **_names(
        "enable_cuda_graph cuda_graph_* external_cuda_graph optimizer_cuda_graph "
        "inference_cuda_graph_scope delay_offload_until_cuda_graph moe_paged_stash* "
        "moe_pad_experts_for_cuda_graph_inference",
        "a CUDA graph repeats kernels and runs none of the Python that records and replays",
    ),
    "calculate_per_token_loss": "the loss has its denominators, over all ranks, already",
    "average_in_collective": "the loss is a sum over ranks; its scale is set for sums",
    **_names(
        "use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy "
        "outer_dp_sharding_strategy fsdp_* megatron_fsdp_* preserve_fp32_weights "
        "keep_fp8_transpose_cache suggested_communication_unit_size gradient_reduce_div_fusion",
        "FSDP splits weights in a way that neither export nor checkpoints know",
    ),
    **_names(
        "cp_comm_type hierarchical_context_parallel_sizes hybrid_context_parallel "
        "max_seqlen_per_dp_cp_rank",
        "context parallelism (--cp) gathers keys and values from ranks of one group",
    ),
    **_names(
        "fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
        "fp16 with loss scaling skips steps; --dtype is float32 or bfloat16",
    ),
    **_names(
        "enable_autocast autocast_dtype",
        "--dtype says in what is computed; autocast would take the router and log-probs with it",
    ),
    **_names(
        "fp8_param fp8_param_gather fp4_param fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag "
        "fp8_output_proj",
        "weights stay in the model's own precision: they are exported bit for bit, and log-probs "
        "are computed from the output layer's",
    ),
    **_names(
        "activation_func init_method output_layer_init_method embedding_init_method timers "
        "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func "
        "_cpu_offloading_context fp8_quantizer_factory fp4_quantizer_factory quant_recipe "
        "mtp_grad_scale_func experimental_attention_variant_loss_scale_func",
        "it is a Python object, which no command line can give; the trainer sets what it needs",
    ),
    **_names(
        "perform_initialization use_cpu_initialization init_model_with_meta_device init_method_std "
        "embedding_init_method_std",
        "all weights are loaded from the checkpoint, and their first values are never used",
    ),
    **_names(
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
        "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split mtp_standalone",
        "stages hold equal shares of the layers (--pp, --vpp)",
    ),
    **_names(
        "overlap_p2p_comm batch_p2p_comm deallocate_pipeline_outputs use_ring_exchange_p2p "
        "overlap_p2p_comm_warmup_flush variable_seq_lengths microbatch_group_size_per_vp_stage",
        "the trainer sets how stages exchange tensors: others swap them without an error, or free "
        "what is still being sent",
    ),
    **_names(
        "overlap_moe_expert_parallel_comm delay_wgrad_compute high_priority_a2a_comm_stream "
        "overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release",
        "it runs parts of layers in a schedule in which routers are not recorded",
    ),
    **_names(
        "cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute "
        "wgrad_deferral_limit",
        "the trainer's own head makes log-probs without logits",
    ),
    **_names(
        "attention_softmax_in_fp32 masked_softmax_fusion apply_query_key_layer_scaling "
        "persist_layer_norm memory_efficient_layer_norm test_mode use_fused_weighted_squared_relu",
        "no attention, norm or activation that is used here reads it",
    ),
    **_names(
        "tp_comm_* symmetric_ar_type",
        "it needs buffers that Megatron-LM's script allocates and this trainer does not",
    ),
    **_names(
        "qk_clip qk_clip_* log_max_attention_logit grad_norm_skip_threshold log_num_zeros_in_grad "
        "check_for_nan_in_grad check_for_large_grads barrier_with_L1_time config_logger_dir",
        "it belongs to Megatron-LM's own loop: weights would change, or steps fall out, without a "
        "line in this trainer's log",
    ),
    **_names(
        "num_distributed_optimizer_instances overlap_param_gather_with_optimizer_step "
        "align_param_gather",
        "it splits the optimizer in a way that a run's checkpoints do not follow",
    ),
    **_names(
        "transformer_impl moe_grouped_gemm moe_use_legacy_grouped_gemm use_kitchen "
        "use_kitchen_attention kitchen_attention_backend use_transformer_engine_op_fuser "
        "fused_residual_rmsnorm use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp "
        "moe_single_grouped_weight moe_single_grouped_bias moe_shared_expert_glu_interleave_size "
        "moe_mlp_glu_interleave_size mla_down_proj_fusion tensor_parallel_num_weight_shards "
        "gtp_weight_remat_size expert_tensor_parallel_num_weight_shards "
        "expert_gtp_weight_remat_size",
        "the trainer chooses the layers (moe-upgrpo doctor shows which); others name or order "
        "their weights in ways that the checkpoint's do not map to",
    ),
    **_names(
        "inference_* flash_decode use_inference_optimized_layers mlp_chunks_for_prefill "
        "cache_mla_latents nccl_all_reduce_for_prefill",
        "it is for inference by Megatron; rollouts come from an engine",
    ),
    **_names(
        "moe_extended_tp async_tensor_model_parallel_allreduce num_buckets main_grads_dtype "
        "pipeline_model_parallel_comm_backend use_te_rng_tracker",
        "nothing that this trainer runs reads it, or it needs settings outside of this config",
    ),
}  # fmt: skip

COMMUNICATION, MEMORY, KERNELS, NUMBERS = "communication", "memory", "kernels", "numbers"
# Name, or pattern of names -> what it affects. In a resumed run, the first two may change.
PASSED: dict[str, str] = {
    **_names(
        "overlap_grad_reduce overlap_param_gather bucket_size pad_buckets_for_high_nccl_busbw "
        "nccl_ub disable_symmetric_registration batch_p2p_sync moe_shared_expert_overlap "
        "moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend "
        "moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_* "
        "moe_permute_fusion_into_hybridep moe_ncclep_* overlap_cpu_optimizer_d2h_h2d "
        "pin_cpu_grads pin_cpu_params",
        COMMUNICATION,
    ),
    **_names(
        "optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload "
        "cpu_offloading cpu_offloading_* fine_grained_activation_offloading "
        "fine_grained_offloading_max_inflight_offloads offload_modules min_offloaded_tensor_size "
        "activation_offload_fraction delta_offload_bytes_across_pp_ranks "
        "clone_scatter_output_in_embedding disable_parameter_transpose_cache "
        "mlp_chunks_for_training",
        MEMORY,
    ),
    **_names(
        "moe_permute_fusion bias_activation_fusion bias_dropout_fusion apply_rope_fusion "
        "fused_single_qkv_rope gradient_accumulation_fusion use_te_activation_func "
        "attention_backend flash_attention_version batch_invariant_mode",
        KERNELS,
    ),
    **_names(
        "use_precision_aware_optimizer store_param_remainders main_params_dtype exp_avg_dtype "
        "exp_avg_sq_dtype grad_reduce_in_fp32 reduce_scatter_with_fp32_accumulation "
        "param_name_patterns_for_fp32_local_accumulation "
        "disable_bf16_reduced_precision_matmul decoupled_weight_decay apply_wd_to_qk_layernorm "
        "activation_func_fp8_input_store fp8 fp8_recipe fp8_margin fp8_interval "
        "fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention "
        "fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16 "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe",
        NUMBERS,
    ),
}
MAY_CHANGE = (COMMUNICATION, MEMORY)

CUDA, TE = "a GPU", "Transformer Engine, and a GPU"
# Requirements of those that are passed, where they are turned on.
NEEDS: dict[str, str] = {
    **_names(
        "nccl_ub disable_symmetric_registration moe_enable_deepep moe_flex_dispatcher_backend "
        "moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_* moe_ncclep_* "
        "moe_permute_fusion_into_hybridep gradient_accumulation_fusion "
        "disable_bf16_reduced_precision_matmul",
        CUDA,
    ),
    **_names(
        "moe_permute_fusion apply_rope_fusion fused_single_qkv_rope use_te_activation_func "
        "attention_backend flash_attention_version batch_invariant_mode cpu_offloading "
        "cpu_offloading_* fine_grained_* offload_modules min_offloaded_tensor_size "
        "activation_offload_fraction delta_offload_bytes_across_pp_ranks "
        "disable_parameter_transpose_cache use_precision_aware_optimizer store_param_remainders "
        "activation_func_fp8_input_store fp8* fp4* tp_only_amax_red first_last_layers_bf16 "
        "num_layers_at_*",
        TE,
    ),
}


def found_in(table: Mapping[str, str], name: str) -> str | None:
    """The entry that applies to a name; it may be a pattern."""
    if name in table:
        return table[name]
    return next((said for pattern, said in table.items() if fnmatchcase(name, pattern)), None)


def may_change(name: str) -> bool:
    """Whether a resumed run may have another value of an option."""
    return found_in(PASSED, name) in MAY_CHANGE


def rows(table: Mapping[str, str]) -> list[list[str]]:
    """Rows for the docs: [text, the names that it applies to], one for each text of the table."""
    found: dict[str, list[str]] = {}
    for name, said in table.items():
        found.setdefault(said, []).append(f"`{name}`")
    return [[said, ", ".join(names)] for said, names in found.items()]
