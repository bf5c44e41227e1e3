"""Llama 2 and 3.x, dense: no biases; 3.1 and later scale their rope."""

from megatron_rl.weights.families.decoder import LAYER, Family

FAMILY = Family(model_type="llama", layer_rules=LAYER, qkv_bias=False, neutral={})
