"""One name for a parameter, whichever of Megatron-Core's layers hold it.

The tables name parameters as the local layers do. Transformer Engine's layers fuse a norm into the
linear that follows it, and keep all experts of a rank in one module.
"""

import re

_FROM_TRANSFORMER_ENGINE = (
    (r"\.self_attention\.linear_qkv\.layer_norm_weight$", ".input_layernorm.weight"),
    (r"\.mlp\.linear_fc1\.layer_norm_weight$", ".pre_mlp_layernorm.weight"),
    (
        r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$",
        r".mlp.experts.local_experts.\2.\1.weight",
    ),
)


def local_name(name: str) -> str:
    """The name in the local layers of a parameter of either kind of layers."""
    for pattern, replacement in _FROM_TRANSFORMER_ENGINE:
        name = re.sub(pattern, replacement, name)
    return name
