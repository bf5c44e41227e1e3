"""The network that tests of this folder are about, in numbers."""

from megatron_rl.weights.arch import ModelArch

ARCH = ModelArch(
    model_type="qwen2",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=256,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=32,
    vocab_size=112,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling_factor=None,
    max_position_embeddings=256,
    qkv_bias=True,
    tied_embeddings=False,
)
