"""Qwen2, Qwen2.5 and Qwen2.5-Math, dense: biases on query, key and value."""

from megatron_rl.weights.families.decoder import LAYER, QKV_BIAS, Family

FAMILY = Family(
    model_type="qwen2",
    layer_rules=(*LAYER, QKV_BIAS),
    qkv_bias=True,
    neutral={"attention_bias": (True,), "use_mrope": (False,)},
)
