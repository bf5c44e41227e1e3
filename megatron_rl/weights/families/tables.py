"""Every model family, as a table; to add a family, change this file.

A family says which rows its layers have (rows.py; names in Megatron-Core, Hugging Face and vLLM)
and how its config.json reads. `defaults` are the values that transformers takes for absent fields.
`neutral` are fields that we do not implement, with the values at which they change nothing, beside
those of hf_config.py. Every other field is refused by name.
"""

from megatron_rl.weights.families.family import Family, MixtureFields
from megatron_rl.weights.families.rows import ATTENTION, DENSE, QK_NORM, QKV_BIAS, experts, router

# Llama 2 and 3.x; 3.1 and later scale their rope.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    attention=ATTENTION,
    dense=DENSE,
)

# Where config.json has no sliding_window, transformers slides a window of 4096, which is refused.
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    attention=ATTENTION,
    dense=DENSE,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
)

# Qwen2, Qwen2.5 and Qwen2.5-Math.
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    attention=(*ATTENTION, QKV_BIAS),
    dense=DENSE,
    defaults={"num_key_value_heads": 32, "use_sliding_window": False},
    neutral={"attention_bias": (True,), "use_mrope": (False,)},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    attention=(*ATTENTION, *QK_NORM),
    dense=DENSE,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
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

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL)
}
