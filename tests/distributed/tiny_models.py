"""Random models of four layers on disk, and random graded groups to train them on."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.megatron import faults
from megatron_rl.types import Prompt, Rollout, RolloutGroup

VOCAB_SIZE = 90  # padded to 128: with four ranks one shard is cut and one is padding alone
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
WIDE_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
EIGHT_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# Model -> transformers' classes begin with, what differs from SIZES.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_two_layers": ("Qwen2", {"num_hidden_layers": 2}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2_six_layers": ("Qwen2", {"num_hidden_layers": 6, "tie_word_embeddings": True}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama3_rope": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE}),
    "llama3_tied": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": WIDE_ROPE, "head_dim": 24}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": WIDE_ROPE}),
    "qwen3_tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**EIGHT_EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3_moe_raw": ("Qwen3Moe", {**EIGHT_EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            **EIGHT_EXPERTS,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": WIDE_ROPE},
    ),
}
GLM4 = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 0,
    "head_dim": 24,
    "use_qk_norm": True,
}
MODELS["glm4_moe"] = ("Glm4Moe", GLM4)
# Two of four groups are chosen, and four of their eight experts; latent vectors of 24 and 32.
LATENT: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 16,
    "rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3},
}
MODELS["deepseek_v3"] = ("DeepseekV3", LATENT)
# As Moonlight has it: queries without a latent vector, one group.
MOONLIGHT: dict[str, Any] = {
    **LATENT,
    "n_routed_experts": 8,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": SIZES["rope_parameters"],
    "rms_norm_eps": 1e-2,  # of latent vectors, too: see float64_modules.one_epsilon
}
MODELS["moonlight"] = ("DeepseekV3", MOONLIGHT)
# Values as wide as keys.
GLM4_LITE: dict[str, Any] = {
    **MOONLIGHT,
    "q_lora_rank": 24,
    "rms_norm_eps": 1e-6,
    "v_head_dim": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
MODELS["glm4_moe_lite"] = ("Glm4MoeLite", GLM4_LITE)
LATENTS = ("deepseek_v3", "moonlight", "glm4_moe_lite")
# Three gated delta nets to one layer with attention, and the other way round.
DELTA: dict[str, Any] = {
    "initializer_range": 0.08,  # a net makes more of rounding than attention does
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {**SIZES["rope_parameters"], "partial_rotary_factor": 0.25},
}
FEW_NETS: dict[str, Any] = {
    **DELTA,
    "tie_word_embeddings": True,
    "linear_num_key_heads": 4,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_key_value_heads": 4,
}
DELTAS: tuple[str, ...] = ()
if not faults.is_present("packed_delta_nets"):
    MODELS["qwen3_5"] = ("Qwen3_5", DELTA)
    MODELS["qwen3_5_few_nets"] = ("Qwen3_5", FEW_NETS)
    DELTAS = ("qwen3_5", "qwen3_5_few_nets")
# Of another shape than the models that it teaches.
TEACHER = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 8, "head_dim": 24}
MODELS["teacher"] = ("Llama", TEACHER)
# What does not divide by two, and more ranks than key/value heads.
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 151}
MODELS["qwen2_odd"] = ("Qwen2", ODD)
MODELS["qwen2_odd_tied"] = ("Qwen2", {**ODD, "tie_word_embeddings": True})
OF_THREES = ("qwen2_odd", "qwen2_odd_tied")  # whose sizes divide by three, and not by two
EIGHT_HEADS = {"num_attention_heads": 8, "vocab_size": 151, "tie_word_embeddings": True}
MODELS["qwen2_eight_heads"] = ("Qwen2", EIGHT_HEADS)
MODELS["qwen2_eight_layers"] = ("Qwen2", {"num_hidden_layers": 8})
# One matrix for queries, keys and values, and one for gate and up.
PHI: dict[str, Any] = {"pad_token_id": None, "original_max_position_embeddings": 256}
MODELS["phi4"] = ("Phi3", PHI)
# Three quarters of a head turn, by other factors behind 256 tokens; a window that is never full.
PHI_MINI: dict[str, Any] = {
    **PHI,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "sliding_window": 8192,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3, 1.7, 2.2, 3.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 30.0],
    },
}
MODELS["phi4_mini"] = ("Phi3", PHI_MINI)
OLMO: dict[str, Any] = {"pad_token_id": None}
MODELS["olmo2"] = ("Olmo2", OLMO)
# Three of four layers see eight tokens, and turn by another base and without YaRN.
WINDOWS: dict[str, Any] = {
    **OLMO,
    "sliding_window": 8,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        "full_attention": YARN_ROPE,
    },
}
MODELS["olmo3"] = ("Olmo3", WINDOWS)
# All layers have a window.
MODELS["mistral_window"] = ("Mistral", {"sliding_window": 8, "head_dim": 24})
SWITCHED_ON = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
MODELS["qwen2_window"] = ("Qwen2", {**SWITCHED_ON, "tie_word_embeddings": True})
MODELS["phi3_window"] = ("Phi3", {**PHI, "sliding_window": 7})
MODELS["qwen3_window"] = ("Qwen3", {**SWITCHED_ON, "head_dim": 32})
# A mixture in every layer, with one expert more that every token meets behind a gate.
NETS_OF_EXPERTS: dict[str, Any] = {
    **DELTA,
    **EIGHT_EXPERTS,
    "shared_expert_intermediate_size": 40,
}
OF_EXPERTS = ("qwen3_5_moe",) if DELTAS else ()
if DELTAS:
    MODELS["qwen3_5_moe"] = ("Qwen3_5Moe", NETS_OF_EXPERTS)
    DELTAS += OF_EXPERTS
MIXTURES = (
    *("qwen3_moe", "qwen3_moe_raw", "qwen3_moe_mixed", "mixtral", "glm4_moe"),
    *(*LATENTS, *OF_EXPERTS),
)
STACKED = ("Qwen3_5Moe",)  # whose published files hold the experts of a layer in one tensor

# All correct, all wrong, mixed, graded in between, and alone in their group.
REWARDS: tuple[tuple[float, ...], ...] = (
    (1.0, -1.0, -1.0, 1.0),
    (1.0, 1.0, 1.0),
    (-1.0, -1.0, -1.0),
    (1.0,),
    (-1.0, 1.0),
    (0.5, 1.0, -1.0),
    (-1.0,),
    (1.0, -1.0, -1.0, -1.0),
    (1.0, -1.0, 0.5, 0.5, -1.0),
)
# Without ties, so that best and worst are known: mixed, all correct, all wrong, alone.
RANKED_REWARDS: tuple[tuple[float, ...], ...] = (
    (1.0, -1.0),
    (-0.3, 1.0, -1.0),
    (1.0, 0.5),
    (-0.5, -1.0),
    (0.9, -0.2, 0.1, 0.0),
    (1.0,),
    (-1.0, -0.5, 0.2),
    (0.4, 0.3, -0.1),
)
# As rounds of two leave them, up to eight until two are right and two wrong; and one of a pair.
ROUNDS_REWARDS: tuple[tuple[float, ...], ...] = (
    (1.0, -1.0, -1.0, 1.0),
    (-1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0),
    (1.0, 1.0, 1.0, -1.0, 1.0, -1.0),
    (-1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0),
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (-1.0, -1.0, -1.0, -1.0, -1.0, -0.5, -1.0, -1.0),
    (1.0, -1.0),
    (0.5, -1.0, -1.0, 1.0, 0.5, -0.5),
)
MAX_RESPONSE_TOKENS = 24


def write_model(name: str, model_dir: Path) -> None:
    """config.json and model.safetensors in float32; norms and biases are random like all others."""
    import transformers

    torch.manual_seed(list(MODELS).index(name))
    family, changes = MODELS[name]
    of_text = "Text" if family.startswith("Qwen3_5") else ""
    config_class = getattr(transformers, f"{family}{of_text}Config")
    settings = copy.deepcopy({**SIZES, **changes})  # transformers changes dictionaries
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        with_long_memory(model)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.3 * torch.randn_like(bias))
    model.save_pretrained(model_dir, save_original_format=family not in STACKED)


def with_long_memory(model: Any) -> None:
    """Let the states of gated delta nets last.

    As transformers draws A_log, nearly all of a state is gone by the next token, and an output is
    that token's value, normed, by a sign that float32 may not know.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.sub_(4)


def graded_groups(
    rewards_of: Sequence[Sequence[float]] = REWARDS, seed: int = 1
) -> list[RolloutGroup]:
    """One group per row of rewards; lengths are ragged, from a single token on."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for number, rewards in enumerate(rewards_of):
        rollouts = tuple(
            Rollout(
                response_tokens=_tokens(1, MAX_RESPONSE_TOKENS, generator),
                rollout_logprobs=None,
                finish_reason="length" if index == 3 else "stop",
                policy_version=0,
                reward=reward,
            )
            for index, reward in enumerate(rewards)
        )
        groups.append(RolloutGroup(prompt=_prompt(number, generator), rollouts=rollouts))
    return groups


def gold_groups(seed: int = 2) -> list[RolloutGroup]:
    """Groups of one gold response, which has neither a reward nor log-probs."""
    generator = torch.Generator().manual_seed(seed)
    return [
        RolloutGroup(
            prompt=_prompt(number, generator),
            rollouts=(
                Rollout(
                    response_tokens=_tokens(1, MAX_RESPONSE_TOKENS, generator),
                    rollout_logprobs=None,
                    finish_reason="gold",
                    policy_version=0,
                ),
            ),
        )
        for number in range(7)
    ]


def _prompt(number: int, generator: torch.Generator) -> Prompt:
    return Prompt(group_id=11 + 3 * number, tokens=_tokens(1, 9, generator), answer="")


def _tokens(shortest: int, longest: int, generator: torch.Generator) -> Tensor:
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
