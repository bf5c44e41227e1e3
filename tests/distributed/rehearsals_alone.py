"""Rehearsals in a process of its own: every preset, every family, layouts of 8 to 1,024 ranks.

`python rehearsals_alone.py share` rehearses a preset of each kind of pass, and every second layout.

Models have their published widths, and few layers, since those are what a rehearsal takes time for.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.algorithms.presets import PRESETS
from megatron_rl.config import RunConfig
from megatron_rl.rehearsal.device import NAME, register
from megatron_rl.rehearsal.ledger import Ledger
from megatron_rl.rehearsal.rank import Rehearsal, rehearse
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.hf_config import read_arch
from megatron_rl.weights.families.tables import FAMILIES

PUBLISHED = Path(__file__).parents[1] / "data" / "published_configs.yaml"
LAYERS = 1
SMALL, V3 = "Qwen2.5-0.5B-Instruct", "DeepSeek-V3, dequantized"

# Model, ranks, the rank that is rehearsed, layers, sizes of `parallel`.
LAYOUTS: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    ("Qwen2.5-Math-7B", 8, 0, 2, {"tp": 4, "sequence_parallel": True}),
    ("Llama-3.1-8B", 16, 15, 4, {"tp": 2, "pp": 2, "last": 1}),
    ("Qwen3-8B", 64, 8, 8, {"tp": 4, "pp": 2, "vpp": 2, "sequence_parallel": True}),
    ("Mistral-7B-Instruct-v0.3", 128, 0, 2, {"tp": 8, "sequence_parallel": True}),
    ("Mixtral-8x7B-Instruct-v0.1", 32, 0, 2, {"tp": 2, "sequence_parallel": True, "ep": 8}),
    ("Qwen3-30B-A3B", 256, 255, 4, {"pp": 2, "ep": 16}),
    ("GLM-4.5", 512, 500, 8, {"tp": 4, "pp": 2, "sequence_parallel": True, "ep": 32}),
    (V3, 1024, 640, 8, {"tp": 8, "pp": 2, "sequence_parallel": True, "ep": 64}),
    ("Moonlight-16B-A3B-Instruct", 16, 9, 4, {"pp": 2, "ep": 4}),
    ("GLM-4.7-Flash", 64, 40, 4, {"tp": 4, "pp": 2, "sequence_parallel": True, "ep": 16}),
    ("Phi-4", 32, 16, 4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    ("OLMo-2-0325-32B-Instruct", 64, 40, 4, {"tp": 8, "pp": 2, "sequence_parallel": True}),
    ("Phi-4-mini-instruct", 8, 0, 2, {"tp": 4, "sequence_parallel": True}),
    ("Qwen3.5-27B, its text", 32, 20, 8, {"tp": 4, "pp": 2, "sequence_parallel": True}),
    ("Qwen2.5-Math-7B", 1024, 512, 8, {"tp": 4, "pp": 4, "sequence_parallel": True}),
    ("Olmo-3-32B-Think", 64, 40, 8, {"tp": 8, "pp": 2, "sequence_parallel": True}),
    (
        "Qwen3.5-35B-A3B, its text",
        64,
        40,
        8,
        {"tp": 2, "pp": 2, "sequence_parallel": True, "ep": 8},
    ),
)
PASSES = ("sft", "grpo", "ppo", "iterative_dpo", "distillation")
NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "last": "num_layers_in_last_pipeline_stage",
}


def main() -> None:
    is_share = sys.argv[1:] == ["share"]
    _check_what_is_found()
    published = {row["name"]: row["config"] for row in yaml.safe_load(PUBLISHED.read_text())}
    for model, world_size, rank, layers, sizes in LAYOUTS[:: 2 if is_share else 1]:
        arch = _arch(published[model], layers)
        found = _rehearsed("grpo", arch, world_size, rank, sizes)
        _check_weights(found, arch, sizes)
    for preset in PASSES if is_share else PRESETS:
        _rehearsed(preset, _arch(published[SMALL], LAYERS), 8, 0, {"tp": 2})


def _check_what_is_found() -> None:
    """Tensors of two devices, a number that the host reads, and memory as it comes and goes."""
    device = register().current_device()
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(NAME) as ledger:
        one = torch.ones(1024, device=device)
        assert (ledger.held, ledger.peak) == (4096, 4096)
        two = one * 2
        del one
        assert (ledger.held, ledger.peak) == (4096, 8192)
        assert ledger.mark() == ledger.peak == 4096
        two.untyped_storage().resize_(0)  # as an offload does
        assert ledger.held == 0
        with contextlib.suppress(RuntimeError):
            _ = torch.ones(1024, device=device) + torch.ones(1024)
            raise AssertionError("tensors of two devices were added")
        assert not ledger.waits
        with ledger.looking_for_waits():
            read = [float(torch.ones(3, device=device).sum()), torch.ones(2, device=device).cpu()]
            torch.ones(2, device=device).to("cpu", non_blocking=True)
        assert read[0] == 1.0
        assert sum(ledger.waits.values()) == 2, ledger.waits


def _arch(config: dict[str, Any], layers: int) -> ModelArch:
    few: dict[str, Any] = {"num_hidden_layers": layers}
    if "layer_types" in config:
        few["layer_types"] = config["layer_types"][:layers]
    return read_arch(FAMILIES[config["model_type"]], config | few, "", ())


def _rehearsed(
    preset: str, arch: ModelArch, world_size: int, rank: int, sizes: dict[str, Any]
) -> Rehearsal:
    parallel = {NAMES.get(name, name): size for name, size in sizes.items()}
    if "ep" in sizes:
        parallel["expert_tensor_parallel_size"] = 1
    config = RunConfig.model_validate(
        {
            "model": {"path": "none", "dtype": "bfloat16"},
            "algorithm": {"preset": preset},
            "prompts": {
                "path": "none.jsonl",
                "prompts_per_iteration": 2048,
                "max_prompt_tokens": 128,
            },
            "rollout": {
                "engine": "vllm",
                "max_response_tokens": 384,
                "group_size": 1 if preset == "ppo" else 4,
            },
            "batching": {"max_tokens_per_microbatch": 2048},
            "reward": {"kind": "math"},
            "run": {"num_iterations": 1, "output_dir": "none"},
            "parallel": parallel,
        }
    )
    found = rehearse(config, arch, world_size, rank)
    sys.stdout.write(f"{preset}, {arch.model_type}, rank {rank} of {world_size}: {found}\n")
    own = [place for place in found.waits if place.startswith("megatron_rl/")]
    assert not own, f"the host waits for the device: {own}"
    return found


def _check_weights(found: Rehearsal, arch: ModelArch, sizes: dict[str, Any]) -> None:
    """Against the model's parameters, by hand: 2 bytes each, of which the rank has its share."""
    experts = dense = 0
    if arch.mixture is not None:
        mixture = arch.mixture
        experts = 3 * arch.hidden_size * mixture.ffn_hidden_size * mixture.num_experts
        dense = 3 * arch.hidden_size * mixture.shared_ffn_hidden_size
    tp, pp, ep = sizes.get("tp", 1), sizes.get("pp", 1), sizes.get("ep", 1)
    attention = arch.hidden_size * (2 * arch.query_rows + 2 * arch.key_rows)
    if (latent := arch.latent) is not None:
        queries = arch.hidden_size * arch.query_rows
        if latent.query_rank is not None:
            queries = latent.query_rank * (arch.hidden_size + arch.query_rows)
        raised = arch.num_attention_heads * (latent.still_dim + latent.value_dim)
        keys = (latent.rank + latent.turning_dim) * arch.hidden_size + latent.rank * raised
        output = arch.hidden_size * arch.num_attention_heads * latent.value_dim
        attention = queries + keys + output
    if (delta := arch.delta) is not None:  # three layers of four have a net
        attention += arch.hidden_size * arch.query_rows
        values = delta.num_value_heads * delta.value_dim
        rows = 2 * delta.num_key_heads * delta.key_dim + 2 * values + 2 * delta.num_value_heads
        attention = (attention + 3 * arch.hidden_size * (rows + values)) / 4
    dense = dense if experts else 3 * arch.hidden_size * arch.ffn_hidden_size
    layer = (attention + dense) / tp + experts / ep
    vocabulary = arch.vocab_size * arch.hidden_size / tp
    stage = found.rank // (found.world_size // pp)
    on_ends = (stage == 0) + (stage == pp - 1)
    if arch.tied_embeddings and pp == 1:
        on_ends = 1
    layers = sizes["last"] if "last" in sizes else arch.num_layers / pp  # a rank of the last one
    expected = 2 * (layers * layer + on_ends * vocabulary)
    assert abs(found.held["weights"] / expected - 1) < 0.01, (found.held, expected)


if __name__ == "__main__":
    main()
