"""Fields of Megatron-Core's TransformerConfig that model.megatron may set, and why not the others.

Every field that a tested version has is decided here, once. A field that is not known to change
neither network nor routing, nor anything that this package relies on, is not settable.
"""

from collections.abc import Mapping

from megatron_rl.parallel.config import ParallelConfig


def by_field(groups: Mapping[str, str]) -> dict[str, str]:
    """Field -> the reason of its group."""
    pairs = [(field, reason) for reason, fields in groups.items() for field in fields.split()]
    assert len(pairs) == len(dict(pairs)), "a field is in two groups"
    return dict(pairs)


# Why it is safe to set -> fields.
SETTABLE = by_field(
    {
        "communication between pipeline stages: the same tensors, at other times": """
            overlap_p2p_comm batch_p2p_comm batch_p2p_sync""",
        "memory: what is kept, moved to the host or computed again": """
            deallocate_pipeline_outputs distribute_saved_activations
            clone_scatter_output_in_embedding fine_grained_activation_offloading offload_modules
            min_offloaded_tensor_size delta_offload_bytes_across_pp_ranks
            activation_offload_fraction fine_grained_offloading_max_inflight_offloads""",
        "speed: the same products and sums by other kernels": """
            gradient_accumulation_fusion bias_activation_fusion bias_dropout_fusion
            deterministic_mode disable_bf16_reduced_precision_matmul""",
        "dispatch: the same tokens to the same experts, by other kernels": """
            moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
            moe_deepep_num_sms moe_hybridep_num_sms moe_permute_fusion_into_hybridep
            moe_hybridep_pad_uneven_dispatch_inputs moe_hybridep_num_blocks_permute
            moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing""",
        "precision of the router's own product, which only near ties notice": "moe_router_dtype",
        "debugging: it writes what entry points were called with": "config_logger_dir",
    }
)
# The same, where layers are Transformer Engine's: local ones do not read them.
SETTABLE_OF_TE = by_field(
    {
        "memory: activations in host memory": """
            cpu_offloading cpu_offloading_num_layers cpu_offloading_activations
            cpu_offloading_weights cpu_offloading_double_buffering
            cpu_offloading_retain_pinned_cpu_buffers""",
        "speed: the same products and sums by other kernels": """
            flash_attention_version use_te_activation_func fused_residual_rmsnorm
            moe_permute_fusion moe_router_fusion""",
    }
)
# They change the gradient, on purpose.
OF_ROUTERS = by_field(
    {
        "losses of routers, which are ours (auxiliary.py)": """
            moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff""",
        "the step of the bias of experts after an update, which is ours, too": """
            moe_router_bias_update_rate""",
    }
)
NO_DROPOUT = "the engine samples without dropout, so the trainer must score without it"
# Fields that may have some of their values: those, and why not the others.
VALUES: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_dropout": ((0.0,), NO_DROPOUT),
    "attention_dropout": ((0.0,), NO_DROPOUT),
    "moe_token_dispatcher_type": (
        ("alltoall", "flex"),
        "rows are packed, and their lengths differ between the ranks that share experts",
    ),
    "attention_backend": (
        ("auto", "flash", "fused", "unfused"),
        "one of Transformer Engine's kernels has to run",
    ),
}
OF_TE = (*SETTABLE_OF_TE, "attention_backend")  # without effect in local layers
# Fields that are refused while Megatron-Core has the fault.
FAULTY = {
    "perform_initialization": "weights_without_marks",
}
# Why it cannot be set -> fields.
REFUSED = by_field(
    {
        # With another value Megatron-Core would train another network without an error.
        "the model's config.json decides it": """
            num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
            layernorm_epsilon normalization layernorm_zero_centered_gamma
            apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias gated_linear_unit
            glu_linear_offset activation_func activation_func_clamp_value softmax_scale softmax_type
            qk_layernorm qk_l2_norm attention_output_gate multi_latent_attention
            experimental_attention_variant window_size window_attn_skip_freq rotary_interleaved
            no_rope_freq mrope_section num_moe_experts moe_ffn_hidden_size moe_layer_freq
            moe_latent_size moe_shared_expert_intermediate_size moe_shared_expert_gate
            moe_apply_probs_on_input moe_router_topk moe_router_topk_limited_devices
            moe_router_topk_scaling_factor moe_router_pre_softmax moe_router_score_function
            moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias mtp_num_layers
            heterogeneous_block_specs is_hybrid_model linear_attention_freq linear_conv_kernel_dim
            linear_key_head_dim linear_value_head_dim linear_num_key_heads
            linear_num_value_heads""",
        # Fields of parts that no family has: alone they have no effect, or change the network.
        "it is of a part that the models of weights/families do not have": """
            mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer mtp_detach_heads
            mtp_hybrid_override_pattern mtp_grad_scale_func dsa_indexer_n_heads dsa_indexer_head_dim
            dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
            dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_kernel_backend
            dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
            dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
            experimental_attention_variant_loss_scale_func mamba_state_dim mamba_head_dim
            mamba_num_groups mamba_num_heads
            use_mamba_mem_eff_path mamba_training_ssm_states_dtype moe_shared_expert_overlap
            moe_shared_expert_glu_interleave_size use_grouped_gemm_for_shared_expert
            use_fused_weighted_squared_relu""",
        "it multiplies activations or logits, which the engine does not": """
            use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
            mup_base_head_dim mup_attn_scale_power apply_query_key_layer_scaling""",
        # The engine runs every expert that the router chose, on the very output of the layer
        # before.
        "the trainer must route tokens as the engine does": """
            moe_router_force_load_balancing moe_router_force_biased moe_input_jitter_eps
            moe_token_dropping moe_token_drop_policy moe_expert_capacity_factor
            moe_expert_rank_capacity_factor moe_pad_expert_input_to_capacity
            moe_router_quantile_balancing_ema""",
        "it is rollout.routing_replay": "moe_enable_routing_replay",
        "stages are cut by parallel.num_layers_in_first_pipeline_stage, "
        "parallel.num_layers_in_last_pipeline_stage, "
        "parallel.account_for_embedding_in_pipeline_split and "
        "parallel.account_for_loss_in_pipeline_split": "pipeline_model_parallel_layout",
        "weights would have other names, another order or another split here": """
            tensor_parallel_num_weight_shards gtp_weight_remat_size
            expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size
            moe_single_grouped_weight moe_single_grouped_bias moe_mlp_glu_interleave_size
            hetereogenous_dist_checkpoint""",
        "loss weights are global already, so nothing may divide or scale again": """
            calculate_per_token_loss finalize_model_grads_func grad_scale_func
            moe_grad_scale_func""",
        "head and loss are not Megatron-Core's": """
            cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute
            wgrad_deferral_limit""",
        "every weight is loaded": """
            init_method output_layer_init_method init_method_std embedding_init_method
            embedding_init_method_std init_model_with_meta_device""",
        "rows are brought to a multiple of the pipeline stages, and not of this": """
            microbatch_group_size_per_vp_stage""",
        # Seen at PP 2 VPP 2 with deallocate_pipeline_outputs: gradients off by half their size.
        "it sends outputs that may be freed meanwhile: wrong gradients without an error": """
            overlap_p2p_comm_warmup_flush""",
        "the device decides it": "use_cpu_initialization",
        "rows are packed, and their lengths differ": """
            variable_seq_lengths enable_cuda_graph external_cuda_graph cuda_graph_impl
            cuda_graph_scope cuda_graph_modules cuda_graph_warmup_steps
            cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
            delay_offload_until_cuda_graph use_te_rng_tracker""",
        "model.layer_spec decides it": """
            moe_grouped_gemm moe_use_legacy_grouped_gemm transformer_impl apply_rope_fusion""",
        "model.dtype decides it": """
            params_dtype pipeline_dtype bf16 fp16 fp32_residual_connection enable_autocast
            autocast_dtype""",
        "it is model.recompute_granularity": "recompute_granularity",
        "it is model.recompute_method": "recompute_method",
        "it is model.recompute_num_layers": "recompute_num_layers",
        "it is model.recompute_modules": "recompute_modules moe_layer_recompute",
        "context parallelism is not available yet": """
            hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
            cp_comm_type""",
        "training in 8 or 4 bits is out of scope": """
            fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval
            fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention
            fp8_multi_head_attention fp8_output_proj tp_only_amax_red first_last_layers_bf16
            num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 activation_func_fp8_input_store
            disable_parameter_transpose_cache moe_router_padding_for_quantization
            moe_router_padding_for_fp8 use_kitchen use_kitchen_attention kitchen_attention_backend
            quant_recipe fp4 fp4_recipe fp4_param fp4_quantizer_factory""",
        "Megatron-Core does not generate here, the engine does": """
            flash_decode inference_rng_tracker inference_sampling_seed symmetric_ar_type
            use_inference_optimized_layers inference_fuse_tp_communication mlp_chunks_for_prefill
            inference_cuda_graph_scope nccl_all_reduce_for_prefill
            inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
            inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
            moe_pad_experts_for_cuda_graph_inference""",
        "the training script of Megatron-LM would have to make its buffers": """
            tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag
            tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag
            tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
            tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend""",
        "the forward step of this package does not take part in it": """
            overlap_moe_expert_parallel_comm delay_wgrad_compute
            ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
            overlap_dispatch_backward_with_experts_wgrad
            num_microbatches_with_partial_activation_checkpoints""",
        "it is an object of a program, which a recipe cannot hold": """
            timers no_sync_func grad_sync_func param_sync_func _cpu_offloading_context""",
        "nothing here reads it": """
            moe_extended_tp async_tensor_model_parallel_allreduce
            pipeline_model_parallel_comm_backend barrier_with_L1_time test_mode
            log_max_attention_logit attention_softmax_in_fp32 masked_softmax_fusion
            persist_layer_norm memory_efficient_layer_norm moe_per_layer_logging qk_clip
            qk_clip_alpha qk_clip_threshold""",
        "it is untried with packed rows or on this package's layouts. Add it to settable.py with a "
        "test of its gradient": """
            use_ring_exchange_p2p fused_single_qkv_rope batch_invariant_mode mlp_chunks_for_training
            use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp moe_ncclep_static_shape
            moe_ncclep_zero_copy moe_paged_stash moe_paged_stash_page_size
            moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu""",
        **{f"it is parallel.{name}": name for name in ParallelConfig.model_fields},
    }
)
DECIDED = (*SETTABLE, *SETTABLE_OF_TE, *OF_ROUTERS, *VALUES, *FAULTY, *REFUSED)
"""Every field of the tested versions, and sizes that Megatron-Core keeps elsewhere."""
