"""Every model family, as a table; to add a family, change this file.

A family says which rows its layers have (rows.py; names in Megatron-Core, Hugging Face and vLLM)
and how its config.json reads. `defaults` are the values that transformers takes for absent fields.
`neutral` are fields that we do not implement, with the values at which they change nothing, beside
those of hf_config.py. Every other field is refused by name.
"""

from megatron_rl.weights.families.family import Family, MixtureFields
from megatron_rl.weights.families.rows import (
    ATTENTION,
    DELTA_NET,
    DENSE,
    GATED_ATTENTION,
    GATED_SHARED_EXPERT,
    LATENT_ATTENTION,
    NORMED_ATTENTION,
    QK_NORM,
    QKV_BIAS,
    ROUTER_BIAS,
    SHARED_EXPERT,
    STACKED_ATTENTION,
    STACKED_DENSE,
    expert_stacks,
    experts,
    router,
)

# Llama 2 and 3.x; 3.1 and later scale their rope.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    attention=ATTENTION,
    dense=DENSE,
)

# Where config.json has no sliding_window, transformers slides a window of 4096.
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    attention=ATTENTION,
    dense=DENSE,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    windows="all",
)

SWITCHED_OFF = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

# Qwen2, Qwen2.5 and Qwen2.5-Math.
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    attention=(*ATTENTION, QKV_BIAS),
    dense=DENSE,
    defaults={"num_key_value_heads": 32, **SWITCHED_OFF},
    windows="all or none",
    neutral={"attention_bias": (True,), "use_mrope": (False,)},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    attention=(*ATTENTION, *QK_NORM),
    dense=DENSE,
    defaults={"num_key_value_heads": 32, "head_dim": 128, **SWITCHED_OFF},
    windows="all or none",
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention=(*ATTENTION, *QK_NORM),
    dense=DENSE,
    router=router("mlp"),
    experts=experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    defaults={"num_key_value_heads": 4, "use_sliding_window": False},
    mixture=MixtureFields(ffn_hidden_size="moe_intermediate_size", has_dense_layers=True),
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    attention=ATTENTION,
    dense=(),
    router=router("block_sparse_moe"),
    experts=experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    neutral={"router_jitter_noise": (0, 0.0)},
    mixture=MixtureFields(ffn_hidden_size="intermediate_size", renormalized=True),
)

# Phi-3 to Phi-4, Phi-4-mini. Code of their own, which auto_map names, is not run: transformers and
# vLLM have the network, too. vLLM reads attention_bias and mlp_bias, transformers has no biases.
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    attention=STACKED_ATTENTION,
    dense=STACKED_DENSE,
    defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    neutral={
        "resid_pdrop": (0, 0.0),
        "embd_pdrop": (0, 0.0),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "auto_map": (
            None,
            *(
                {
                    "AutoConfig": "configuration_phi3.Phi3Config",
                    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
                    **tokenizer,
                }
                for tokenizer in ({}, {"AutoTokenizer": "Xenova/gpt-4o"})
            ),
        ),
    },
    partial_rotary=1.0,
    has_long_rope=True,
    windows="all",
)

# OLMo 2. vLLM 0.32 has it by transformers' own network, with layers of vLLM in place of its own.
OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    attention=NORMED_ATTENTION,
    dense=DENSE,
    defaults={"rms_norm_eps": 1e-5},
    turns_in_float32=True,
)

# OLMo 3: OLMo 2 with sliding windows. vLLM 0.32 has it in the same way.
OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    attention=NORMED_ATTENTION,
    dense=DENSE,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
    windows="by layer",
    turns_in_float32=True,
)

# GLM-4.5, 4.6 and 4.7. Its first expert groups are one: n_group and topk_group choose nothing.
GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention=(*ATTENTION, QKV_BIAS, *QK_NORM),
    dense=DENSE,
    router=(*router("mlp"), ROUTER_BIAS, *SHARED_EXPERT),
    experts=experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
    },
    neutral={
        "attention_bias": (True,),  # of queries, keys and values alone
        "norm_topk_prob": (True,),
        "n_group": (1,),
        "topk_group": (1,),
    },
    mixture=MixtureFields(
        ffn_hidden_size="moe_intermediate_size",
        num_experts=("n_routed_experts",),
        renormalized=True,
        is_sigmoid=True,
    ),
    partial_rotary=0.5,
    has_optional_qk_norm=True,
    has_layers_behind=True,
)

# DeepSeek-V3 and R1, Moonlight. Their own code, which auto_map names, is not run: transformers and
# vLLM have the network, too.
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    attention=LATENT_ATTENTION,
    dense=DENSE,
    router=(*router("mlp"), ROUTER_BIAS, *SHARED_EXPERT),
    experts=experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    defaults={
        "num_key_value_heads": None,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    engine_defaults={"scoring_func": "softmax", "topk_method": None},
    neutral={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "moe_layer_freq": (1,),
        "ep_size": (1,),
        "auto_map": (
            None,
            {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModel": "modeling_deepseek.DeepseekV3Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
        ),
    },
    mixture=MixtureFields(
        ffn_hidden_size="moe_intermediate_size",
        num_experts=("n_routed_experts",),
        renormalized=True,
        has_groups=True,
        is_sigmoid=True,
    ),
    has_latent_attention=True,
    has_layers_behind=True,
)

# GLM-4.7-Flash. transformers asks mlp_layer_types which layers are dense, vLLM
# first_k_dense_replace.
GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    attention=LATENT_ATTENTION,
    dense=DENSE,
    router=DEEPSEEK_V3.router,
    experts=DEEPSEEK_V3.experts,
    defaults={
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "rope_interleave": True,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
    },
    neutral={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "n_group": (1,),
        "topk_group": (1,),
    },
    mixture=MixtureFields(
        ffn_hidden_size="moe_intermediate_size",
        num_experts=("n_routed_experts",),
        renormalized=True,
        has_layer_types=True,
        is_sigmoid=True,
    ),
    has_latent_attention=True,
    has_layers_behind=True,
)

# Qwen3.5 and 3.6, their text. In float32 whatever the dtype, as mamba_ssm_dtype asks it of engines,
# are the states of delta nets here, too.
QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    attention=(*GATED_ATTENTION, *QK_NORM),
    delta=DELTA_NET,
    dense=DENSE,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    neutral={
        "attn_output_gate": (True,),
        "output_gate_type": ("swish", "silu"),
        "mamba_ssm_dtype": ("float32",),
    },
    partial_rotary=0.25,
    has_delta=True,
)

# The mixtures among them. What Qwen publishes in 16 bits holds the experts of a layer in two
# stacks; files that transformers has written hold each alone.
QWEN3_5_MOE = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    attention=QWEN3_5.attention,
    delta=DELTA_NET,
    dense=(),
    router=(*router("mlp"), *GATED_SHARED_EXPERT),
    experts=experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    expert_stacks=expert_stacks("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    defaults={
        **QWEN3_5.defaults,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    neutral={**QWEN3_5.neutral, "norm_topk_prob": (True,), "decoder_sparse_step": (1,)},
    mixture=MixtureFields(
        ffn_hidden_size="moe_intermediate_size",
        num_experts=("num_experts",),
        renormalized=True,
        shared_ffn_hidden_size="shared_expert_intermediate_size",
    ),
    partial_rotary=0.25,
    has_delta=True,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, PHI3, OLMO2),
        *(GLM4_MOE, DEEPSEEK_V3, GLM4_MOE_LITE, QWEN3_5, QWEN3_5_MOE, OLMO3),
    )
}
